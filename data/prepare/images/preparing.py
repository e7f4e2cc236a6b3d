"""From one sample of a source to one sample of a shard, or to the reason why there is none."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.prepare.common.geometry import Fit, fill, shorter_side
from data.prepare.common.shard_files import LeftOut, Prepared
from data.prepare.common.sizes import size_fields
from data.prepare.images.image_files import Picture, UnreadableImageError, open_picture, write_picture
from data.prepare.images.named_condition import given_folder, open_condition
from data.prepare.images.settings import ImageSettings
from data.prepare.images.source_sample import SampleFaultError, SourceSample

PADDED = "padded"
"""Name of their number in a shard's account."""


class Preparer:
    """Filters, resizes and packs samples as the settings say.

    Args:
        settings: of the set.
        device: where a network that makes condition images runs.
    """

    def __init__(self, settings: ImageSettings, device: str = "cpu") -> None:
        self.settings = settings
        self._given: Path | None = given_folder(settings.condition)
        named = settings.condition if self._given is None else None
        self._condition = None if named is None else open_condition(named, device)

    def __call__(self, key: str, sample: SourceSample) -> Prepared | LeftOut:
        """One sample.

        Raises:
            SampleFaultError: for one that is broken.
        """
        caption = sample.caption.strip() if isinstance(sample.caption, str) else ""
        unwanted = self._unwanted_caption(caption)
        if unwanted is not None:
            return LeftOut(key, unwanted)
        picture = _open(sample.image)
        size = (picture.image.height, picture.image.width)
        if min(size) < self.settings.min_side:
            return LeftOut(key, "too small")
        if max(size) > self.settings.max_aspect * min(size):
            return LeftOut(key, "too elongated")
        fit = self._fit(size)
        name, content, image = self._pack(picture, sample.image, fit)
        members: dict[str, bytes | str] = {name: content, "txt": caption}
        members |= self._control(sample, image, fit, size)
        fields = {**sample.fields, **size_fields(sample.fields, size, fit)}
        return Prepared(key, members, fields, {PADDED: 1.0} if _is_padded(picture.image, fields) else {})

    def _unwanted_caption(self, caption: str) -> str | None:
        if len(caption) < self.settings.min_caption:
            return "caption too short" if caption else "no caption"
        return "caption too long" if len(caption) > self.settings.max_caption else None

    def _fit(self, size: tuple[int, int]) -> Fit:
        side = self.settings.resolution
        if side is None:
            return Fit(size, 0, 0, size)
        return fill(size, (side, side)) if self.settings.crop == "centre" else shorter_side(size, side)

    def _pack(self, picture: Picture, content: bytes, fit: Fit) -> tuple[str, bytes, Image.Image]:
        """Member, bytes and pixels; the bytes that came wherever the pixels stay the same."""
        image = fit.apply(picture.image)
        if picture.member is not None and image.size == picture.image.size:
            return picture.member, content, image
        settings = self.settings
        return (
            settings.image_format,
            write_picture(image, settings.image_format, settings.quality),
            image,
        )

    def _control(
        self, sample: SourceSample, image: Image.Image, fit: Fit, size: tuple[int, int]
    ) -> dict[str, bytes]:
        """The condition image: made of the stored picture, or a given one that goes the picture's way."""
        if self._condition is not None:
            made = Image.fromarray(self._condition(np.array(image)))
        elif self._given is not None or sample.control is not None:
            given = _open(self._given_bytes(sample)).image
            if (given.height, given.width) != size:
                raise SampleFaultError(
                    f"the condition image is {given.width}x{given.height} and its picture {size[1]}x{size[0]}"
                )
            made = fit.apply(given)
        else:
            return {}
        # Lossless: JPEG blurs the edges that a condition image consists of.
        return {"cond.png": write_picture(made, "png", self.settings.quality)}

    def _given_bytes(self, sample: SourceSample) -> bytes:
        if self._given is None:
            assert sample.control is not None
            return sample.control
        found = sorted(self._given.glob(f"{_escaped(Path(sample.where).with_suffix('').as_posix())}.*"))
        if not found:
            raise SampleFaultError(f"there is no condition image for it in '{self._given}'")
        return found[0].read_bytes()


def _open(content: bytes) -> Picture:
    try:
        return open_picture(content)
    except UnreadableImageError as error:
        raise SampleFaultError(str(error)) from error


def _is_padded(image: Image.Image, fields: Mapping[str, Any]) -> bool:
    """Whether a square picture has the even bands that img2dataset's default resize_mode, border, adds."""
    height, width = fields["original_height"], fields["original_width"]
    band = round(image.width * (1 - min(height, width) / max(height, width)) / 2)
    if image.width != image.height or band < 2:
        return False
    pixels = np.asarray(image)
    pixels = pixels if height < width else pixels.swapaxes(0, 1)
    # JPEG lets the bands vary by a few grey levels; the row beside the picture by more.
    bands = pixels[: band - 1], pixels[1 - band :]
    return all(float(one.reshape(-1, 3).std(axis=0).max()) < 4 for one in bands)


def _escaped(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)
