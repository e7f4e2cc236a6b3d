"""Decodes the members of a sample to the contents of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.shards.decoders import (
    JSON_MEMBER,
    LOGVAR_TENSOR,
    BadSampleError,
    decode,
    decode_array,
    decode_latents,
)
from data.shards.images import FittedImage, Fitting, UndecodableImageError, fit
from data.shards.layout import MEMBERS, EmptyCaptions, Part
from data.shards.order.sample_order import Draw, draw
from sdxs_lightning.core.errors import UserError
from sdxs_lightning.core.image_condition import ImageCondition

_MAX_SIDE = 1 << 20  # pixels; a panorama of a million columns is beyond any camera
_INT_FIELDS = {
    "noise_seed": (0, (1 << 63) - 1),
    "original_height": (1, _MAX_SIDE),
    "original_width": (1, _MAX_SIDE),
    "crop_top": (0, _MAX_SIDE),
    "crop_left": (0, _MAX_SIDE),
}
"""Integer fields of the json member and their ranges: the seed of a pair's noise (core/pair_noise.py); the image size before
resizing, as named by img2dataset, and the crop offset, in pixels."""
_SIZE_FIELDS = ("original_height", "original_width", "crop_top", "crop_left")
_LOGVAR_RANGE = (-30.0, 20.0)
"""Range to which diffusers' DiagonalGaussianDistribution clamps logvar; beyond it, sampled latents overflow."""


@dataclass(frozen=True)
class Reading:
    """Decoding settings."""

    resolution: int | None = None
    """Images are resized to this shorter side and cropped to a square; None requires images of one size."""
    sizes: NDArray[np.integer[Any]] | None = None
    """(samples, 2): with buckets, the height and width to which each image is resized and cropped."""
    latent_sizes: NDArray[np.integer[Any]] | None = None
    """(samples, 2): with buckets of stored latents, the height and width of each."""
    empty_captions: EmptyCaptions = "refuse"
    """Samples with an empty caption: "keep" trains on them, "refuse" treats them as faults."""
    caption_fields: tuple[str, ...] = ()
    """Fields of the json member, strings or lists of strings, one of which is drawn at each visit; by default the text member,
    or else the field `caption`."""
    condition: ImageCondition | None = None
    """Computes control_images from the resized and cropped image; None reads them from members."""
    fitting: Fitting = Fitting()
    """Crops and mirroring; its seed is also used for captions and latents."""
    draw_latents: bool = False
    """Sample latents from the VAE's posterior at each visit, which needs the stored logvar; otherwise use its mean."""


class SampleDecoder:
    """Decodes the caption and the contents of samples.

    Args:
        contents: contents of a batch in addition to captions.
        reading: decoding settings.
    """

    def __init__(self, contents: Sequence[str], reading: Reading) -> None:
        self.reading = reading
        made = {"control_images": "images"} if reading.condition is not None else {}
        parts = [Part(content, MEMBERS[made.get(content, content)]) for content in ("captions", *contents)]
        if reading.caption_fields:
            parts[0] = Part("captions", (JSON_MEMBER,))
        self.parts = parts
        """Parts to read of each sample."""

    def decode(
        self, extensions: Sequence[str], members: Sequence[memoryview], sample: int, position: int, where: str
    ) -> dict[str, Any]:
        """Decode one sample, by content.

        Args:
            extensions: extension of the member of each part.
            members: their bytes.
            sample: sample number, which selects the size of its bucket.
            position: position, which seeds the random draws.
            where: shard and key, for messages.

        Raises:
            BadSampleError: if a member is invalid, whatever the decoder raised.
            UserError: if `data.condition` fails or returns an invalid image.
        """
        try:
            return self._decode(extensions, members, sample, position, where)
        except (BadSampleError, UserError):
            raise
        except Exception as error:
            # A single sample must not end a long run with a traceback; the cause is named and chained.
            raise BadSampleError(
                f"{where}: the sample cannot be decoded ({type(error).__name__}: {error})."
            ) from error

    def missing(self, members: Sequence[str]) -> list[str]:
        """Contents for which a sample has no member."""
        return [part.content for part in self.parts if not set(part.members) & set(members)]

    def decode_members(self, members: Mapping[str, bytes], sample: int, where: str) -> dict[str, Any]:
        """Like `decode`, from all members of a sample by extension.

        Raises:
            BadSampleError: also if a part is missing.
        """
        if missing := self.missing(list(members)):
            raise BadSampleError(f"{where}: there is no member for {', '.join(missing)}.")
        names = [next(name for name in part.members if name in members) for part in self.parts]
        return self.decode(names, [memoryview(members[name]) for name in names], sample, sample, where)

    def _decode(
        self, extensions: Sequence[str], members: Sequence[memoryview], sample: int, position: int, where: str
    ) -> dict[str, Any]:
        decoded: dict[str, Any] = {}
        sizes: tuple[tuple[int, int], tuple[int, int]] | None = None
        fitted: dict[str, FittedImage] = {}  # an image and the condition computed from it share a member
        for part, extension, member in zip(self.parts, extensions, members, strict=True):
            if part.content == "captions":
                decoded["captions"] = self._caption(decode(extension, member, where), where, position)
            elif part.content == "noise_seeds":
                decoded["noise_seeds"] = _int_field(decode(extension, member, where), "noise_seed", where)
            elif part.content == "sizes":
                sizes = _sizes(decode(extension, member, where), where)
            elif part.content == "latents":
                decoded["latents"] = self._latents(member, position, where)
            else:
                if extension not in fitted:
                    given = part.content == "control_images" and self.reading.condition is None
                    fitted[extension] = self._fit(member, sample, position, where, given)
                decoded |= self._image(part.content, fitted[extension], where)
        _check_aligned(fitted, where)
        if sizes is not None:
            decoded["original_size"], before = sizes
            decoded["crop"] = _cropped_again(before, next(iter(fitted.values()), None))
        return decoded

    def _latents(self, member: memoryview, position: int, where: str) -> NDArray[np.generic]:
        mean = decode_latents(member, where)
        if not self.reading.draw_latents:
            return mean
        logvar = decode_latents(member, where, LOGVAR_TENSOR).astype(np.float32)
        low, high = _LOGVAR_RANGE
        if logvar.shape != mean.shape or float(logvar.min()) < low or float(logvar.max()) > high:
            raise BadSampleError(
                f"{where}: the tensor '{LOGVAR_TENSOR}' is {logvar.shape} from {logvar.min():g} to {logvar.max():g}, but that "
                f"of latents {mean.shape} has their shape and is from {low:g} to {high:g}."
            )
        import torch  # local: commands that only check samples start three times as fast without it

        from sdxs_lightning.core.seeding import Stream, normal

        noise = normal(
            self.reading.fitting.seed, Stream.VAE_SAMPLE, torch.tensor([position]), tuple(mean.shape)
        )
        drawn: NDArray[np.generic] = mean + np.exp(0.5 * logvar) * noise[0].numpy()
        return drawn

    def _fit(
        self, member: memoryview, sample: int, position: int, where: str, deep: bool = False
    ) -> FittedImage:
        reading = self.reading
        size = None if reading.resolution is None else (reading.resolution, reading.resolution)
        if reading.sizes is not None:
            size = (int(reading.sizes[sample, 0]), int(reading.sizes[sample, 1]))
        pixels = decode_array(member, where, deep)
        try:
            return fit(pixels, size, reading.fitting, position)
        except UndecodableImageError as error:
            raise BadSampleError(f"{where}: the image cannot be used ({error}).") from error

    def _image(self, content: str, fitted: FittedImage, where: str) -> dict[str, Any]:
        if content == "images":
            return {
                "images": fitted.pixels,
                "original_size": fitted.original_size,
                "crop": fitted.crop,
            }
        if self.reading.condition is None:
            return {"control_images": fitted.pixels}
        return {"control_images": _conditioned(self.reading.condition, fitted.pixels, where)}

    def _caption(self, value: str | dict[str, Any], where: str, position: int) -> str:
        if isinstance(value, str):
            caption = value
        elif self.reading.caption_fields:
            choices = _captions_of(value, self.reading.caption_fields, where) or [""]
            caption = choices[draw(self.reading.fitting.seed, position, Draw.CAPTION, len(choices))]
        else:
            caption = str(_field(value, "caption", str, where)).strip()
        if "\0" in caption:
            raise BadSampleError(f"{where}: the caption holds zero characters, which no text does.")
        if not caption and self.reading.empty_captions == "refuse":
            raise BadSampleError(
                f"{where}: the caption is empty; set data.empty_captions to 'keep' to train on samples "
                "without words."
            )
        return caption


def _captions_of(value: dict[str, Any], fields: Sequence[str], where: str) -> list[str]:
    """Non-empty captions of the fields."""
    found: list[str] = []
    for name in fields:
        held = value.get(name, [])
        captions: list[Any] = held if isinstance(held, list) else [held]
        if not all(isinstance(caption, str) for caption in captions):
            raise BadSampleError(f"{where}: the json member has no string or strings named '{name}'.")
        found += [caption.strip() for caption in captions if caption.strip()]
    return found


def invalid_fields(fields: Mapping[str, Any]) -> Iterator[str]:
    """Error messages for the json fields that training may read."""
    for name, (low, high) in _INT_FIELDS.items():
        value = fields.get(name)
        if value is not None and (type(value) is not int or not low <= value <= high):
            yield f"'{name}' is {_shown(value)}, but it is an integer from {low} to {high}"


def _sizes(fields: dict[str, Any], where: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """Original size and crop from the json member."""
    height, width, top, left = (_int_field(fields, name, where) for name in _SIZE_FIELDS)
    return (height, width), (top, left)


def _cropped_again(before: tuple[int, int], fitted: FittedImage | None) -> tuple[int, int]:
    """Crop offset of an image that was resized and cropped again on reading; unchanged for latents."""
    if fitted is None:
        return before
    top, left = (
        round(place * scale) + place_again
        for place, scale, place_again in zip(before, fitted.scale, fitted.crop, strict=True)
    )
    return top, left


def _check_aligned(fitted: Mapping[str, FittedImage], where: str) -> None:
    """Check that an image and its stored condition image have the same crop."""
    if len({one.resized for one in fitted.values()}) > 1:
        sizes = ", ".join(
            f"{name} {one.original_size[1]} x {one.original_size[0]}" for name, one in fitted.items()
        )
        raise BadSampleError(
            f"{where}: the image and its condition image have other proportions ({sizes}), so they would be cropped at "
            "other places."
        )


def _conditioned(condition: ImageCondition, pixels: NDArray[np.uint8], where: str) -> NDArray[np.uint8]:
    made = condition(np.ascontiguousarray(pixels))
    if made.dtype != np.uint8 or made.shape != pixels.shape:
        raise UserError(
            f"{where}: data.condition made {made.dtype} {made.shape} from an image of {pixels.shape}, but a condition "
            "image is uint8 of the image's shape."
        )
    return np.ascontiguousarray(made)  # torch does not support negative strides


def _int_field(decoded: dict[str, Any], name: str, where: str) -> int:
    value, (low, high) = decoded.get(name), _INT_FIELDS[name]
    if type(value) is not int:
        raise BadSampleError(f"{where}: the json member has no int named '{name}'.")
    if not low <= value <= high:
        raise BadSampleError(
            f"{where}: '{name}' of the json member is {_shown(value)}, but it is an integer from {low} to {high}."
        )
    return value


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:40] + "..."


def _field(decoded: dict[str, Any], name: str, kind: type, where: str) -> Any:
    if not isinstance(decoded.get(name), kind):
        raise BadSampleError(f"{where}: the json member has no {kind.__name__} named '{name}'.")
    return decoded[name]
