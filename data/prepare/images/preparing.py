"""Converts one sample of a source to one sample of a shard, or to the reason why it is left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.conditions import Canny, Depth, ImageCondition, Sketch, SoftEdge
from data.prepare.common.geometry import ResizeAndCrop, resize_shorter_side, resize_to_cover, size_fields
from data.prepare.common.shard_files import LeftOutSample, PreparedSample
from data.prepare.images.image_files import DecodedImage, UnreadableImageError, encode_image, read_image
from data.prepare.images.options import ImageOptions
from data.prepare.images.sources import SampleFaultError, SourceSample
from data.shards.images import SUFFIXES, UndecodableImageError, decode_deep_grey
from data.shards.locations import leaves
from sdxs_lightning.core.errors import UserError

PADDED = "padded"
"""Name of the count of padded images in a shard's statistics."""
_CONDITIONS: dict[str, Callable[[], ImageCondition]] = {
    "canny": Canny,
    "soft_edge": SoftEdge,
    "sketch": Sketch,
}


class SamplePreparer:
    """Filters, resizes and packs samples.

    Args:
        options: of the set.
        device: of a network that makes condition images.

    Raises:
        UserError: for a condition that cannot be used.
    """

    def __init__(self, options: ImageOptions, device: str = "cpu") -> None:
        self.options = options
        self._given = given_folder(options.condition)
        self._condition: ImageCondition | None = None
        if options.condition is not None and self._given is None:
            kind, _, model = options.condition.partition(":")
            self._condition = Depth(model, device) if kind == "depth" else _CONDITIONS[kind]()

    def __call__(self, key: str, sample: SourceSample) -> PreparedSample | LeftOutSample:
        """Prepares one sample.

        Raises:
            SampleFaultError: for one that is broken.
        """
        caption = sample.caption.strip() if isinstance(sample.caption, str) else ""
        if len(caption) < self.options.min_caption:
            return LeftOutSample(key, "caption too short" if caption else "no caption")
        if len(caption) > self.options.max_caption:
            return LeftOutSample(key, "caption too long")
        decoded = _decoded(sample.image)
        size = (decoded.image.height, decoded.image.width)
        assert self.options.min_side is not None
        if min(size) < self.options.min_side:
            return LeftOutSample(key, "too small")
        if max(size) > self.options.max_aspect * min(size):
            return LeftOutSample(key, "too elongated")
        step = self._resize(size)
        name, content, image = self._packed(decoded, sample.image, step)
        members: dict[str, bytes | str] = {name: content, "txt": caption}
        members |= self._condition_image(sample, image, step, size)
        fields = {**sample.fields, **size_fields(sample.fields, size, step)}
        return PreparedSample(
            key, members, fields, {PADDED: 1.0} if _is_padded(decoded.image, fields) else {}
        )

    def _resize(self, size: tuple[int, int]) -> ResizeAndCrop:
        side = self.options.resolution
        if side is None:
            return ResizeAndCrop(size, 0, 0, size)
        if self.options.crop == "centre":
            return resize_to_cover(size, (side, side))
        return resize_shorter_side(size, side)

    def _packed(
        self, decoded: DecodedImage, content: bytes, step: ResizeAndCrop
    ) -> tuple[str, bytes, Image.Image]:
        """Member, bytes and pixels; the source's bytes wherever the pixels stay the same."""
        image = step.apply(decoded.image)
        if decoded.member is not None and image.size == decoded.image.size:
            return decoded.member, content, image
        image_format = self.options.image_format
        return image_format, encode_image(image, image_format, self.options.quality), image

    def _condition_image(
        self, sample: SourceSample, image: Image.Image, step: ResizeAndCrop, size: tuple[int, int]
    ) -> dict[str, bytes]:
        """Made from the stored image, or a given one that is resized like the image."""
        if self._condition is not None:
            condition = Image.fromarray(self._condition(np.array(image)))
        elif self._given is not None or sample.control is not None:
            content = self._given_bytes(sample)
            given = _deep_grey(content) or _decoded(content).image
            if (given.height, given.width) != size:
                raise SampleFaultError(
                    f"the condition image is {given.width}x{given.height} and its image {size[1]}x{size[0]}"
                )
            condition = step.apply(given)
            if condition.mode == "F":
                condition = Image.fromarray(np.rint(np.array(condition)).clip(0, 65535).astype(np.uint16))
        else:
            return {}
        # Lossless: JPEG blurs the edges that a condition image consists of.
        return {"cond.png": encode_image(condition, "png", self.options.quality)}

    def _given_bytes(self, sample: SourceSample) -> bytes:
        if self._given is None:
            assert sample.control is not None
            return sample.control
        stem = Path(sample.where).with_suffix("")
        # photo.jpg's is photo.png, not photo.1.png, which is that of photo.1.jpg, nor photo.json.
        near = (self._given / stem.parent).glob(f"{_escaped(stem.name)}.*")
        found = sorted(path for path in near if path.stem == stem.name and path.suffix.lower() in SUFFIXES)
        if not found:
            raise SampleFaultError(f"there is no condition image for it in '{self._given}'")
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise SampleFaultError(
                f"there are {len(found)} condition images for it in '{self._given}': {names}"
            )
        if found[0].is_symlink() and leaves(found[0], self._given):
            raise UserError(
                f"--condition: '{found[0]}' is a link to a file outside '{self._given}', which is not followed."
            )
        return found[0].read_bytes()


def given_folder(condition: str | None) -> Path | None:
    """The folder of `--condition given:FOLDER`, None for other conditions.

    Raises:
        UserError: for a folder that does not exist.
    """
    if condition is None or not condition.startswith("given:"):
        return None
    folder = Path(condition.removeprefix("given:"))
    if not folder.is_dir():
        raise UserError(f"--condition '{condition}': there is no folder '{folder}'.")
    return folder


def _deep_grey(content: bytes) -> Image.Image | None:
    """16-bit grey, such as a depth map, as floats, which Pillow can resize; None for another image."""
    try:
        pixels = decode_deep_grey(content)
    except UndecodableImageError:
        return None  # `_decoded` says what is wrong
    return None if pixels is None else Image.fromarray(pixels[:, :, 0].astype(np.float32))


def _decoded(content: bytes) -> DecodedImage:
    try:
        return read_image(content)
    except UnreadableImageError as error:
        raise SampleFaultError(str(error)) from error


def _is_padded(image: Image.Image, fields: Mapping[str, Any]) -> bool:
    """Whether a square image has the uniform bands that img2dataset's default resize_mode, border, adds."""
    height, width = fields["original_height"], fields["original_width"]
    band = round(image.width * (1 - min(height, width) / max(height, width)) / 2)
    if image.width != image.height or band < 2:
        return False
    pixels = np.asarray(image)
    pixels = pixels if height < width else pixels.swapaxes(0, 1)
    # JPEG lets the bands vary by a few grey levels; the row next to the image varies by more.
    bands = pixels[: band - 1], pixels[1 - band :]
    return all(float(one.reshape(-1, 3).std(axis=0).max()) < 4 for one in bands)


def _escaped(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)
