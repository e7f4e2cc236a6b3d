"""From the members of one sample to what a batch holds of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from data.shards.choices import Draw, draw
from data.shards.decoders import (
    JSON_MEMBER,
    LOGVAR_TENSOR,
    BadSampleError,
    decode,
    decode_array,
    decode_latents,
)
from data.shards.image_condition import ImageCondition
from data.shards.images import FittedImage, Fitting, fit
from data.shards.layout import MEMBERS, Part
from sdxs_lightning.core.seeding import Stream, normal

EmptyCaptions = Literal["refuse", "keep"]

_SIZE_FIELDS = ("original_height", "original_width", "crop_top", "crop_left")
"""In the json member: the picture before resizing, as img2dataset names it, and where the crop began; pixels."""


@dataclass(frozen=True)
class Reading:
    """How samples are decoded."""

    resolution: int | None = None
    """Images are resized so that the shorter side has this many pixels, then cropped to a square; None takes them as
    they are, all of one size."""
    sizes: NDArray[np.int64] | None = None
    """(samples, 2): with buckets, the height and width that each image is brought to."""
    empty_captions: EmptyCaptions = "refuse"
    """What becomes of a sample without words: "keep" trains on it, "refuse" stops at the first."""
    caption_fields: tuple[str, ...] = ()
    """Fields of the json member, strings or lists of strings, of which one is drawn at each visit; by default the text
    member, else the field `caption`."""
    condition: ImageCondition | None = None
    """Makes control_images from the picture, as resized and cropped; None reads them as members."""
    fitting: Fitting = Fitting()
    """Crops and mirroring; its seed is also that of captions and of latents."""
    draw_latents: bool = False
    """Latents are drawn from the VAE's posterior at each visit, which needs its spread stored; else they are its mean."""


class SampleDecoder:
    """Decodes the caption and the contents of samples.

    Args:
        contents: what a batch holds besides captions.
        reading: how.
    """

    def __init__(self, contents: Sequence[str], reading: Reading) -> None:
        self.reading = reading
        made = {"control_images": "images"} if reading.condition is not None else {}
        parts = [Part(content, MEMBERS[made.get(content, content)]) for content in ("captions", *contents)]
        if reading.caption_fields:
            parts[0] = Part("captions", (JSON_MEMBER,))
        self.parts = parts
        """What has to be read of each sample."""

    def decode(
        self, extensions: Sequence[str], members: Sequence[memoryview], sample: int, position: int, where: str
    ) -> dict[str, Any]:
        """One sample, by content.

        Args:
            extensions: of the member that holds each part.
            members: their bytes.
            sample: its number, for the size of its bucket.
            position: addresses what is drawn.
            where: shard and key, for messages.

        Raises:
            BadSampleError: if a member does not hold what it should.
        """
        decoded: dict[str, Any] = {}
        sizes: tuple[tuple[int, int], tuple[int, int]] | None = None
        fitted: dict[str, FittedImage] = {}  # a picture and the condition made of it share a member
        for part, extension, member in zip(self.parts, extensions, members, strict=True):
            if part.content == "captions":
                decoded["captions"] = self._caption(decode(extension, member, where), where, position)
            elif part.content == "noise_seeds":
                decoded["noise_seeds"] = _field(decode(extension, member, where), "noise_seed", int, where)
            elif part.content == "sizes":
                sizes = _sizes(decode(extension, member, where), where)
            elif part.content == "latents":
                decoded["latents"] = self._latents(member, position, where)
            else:
                if extension not in fitted:
                    fitted[extension] = self._fit(member, sample, position, where)
                decoded |= self._image(part.content, fitted[extension], where)
        if sizes is not None:
            decoded["original_size"], before = sizes
            decoded["crop"] = _cropped_again(before, next(iter(fitted.values()), None))
        return decoded

    def _latents(self, member: memoryview, position: int, where: str) -> NDArray[np.generic]:
        mean = decode_latents(member, where)
        if not self.reading.draw_latents:
            return mean
        logvar = decode_latents(member, where, LOGVAR_TENSOR)
        noise = normal(
            self.reading.fitting.seed, Stream.VAE_SAMPLE, torch.tensor([position]), tuple(mean.shape)
        )
        drawn: NDArray[np.generic] = mean + np.exp(0.5 * logvar.astype(np.float32)) * noise[0].numpy()
        return drawn

    def _fit(self, member: memoryview, sample: int, position: int, where: str) -> FittedImage:
        reading = self.reading
        size = None if reading.resolution is None else (reading.resolution, reading.resolution)
        if reading.sizes is not None:
            size = (int(reading.sizes[sample, 0]), int(reading.sizes[sample, 1]))
        return fit(decode_array(member, where), size, reading.fitting, position)

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
        if not caption and self.reading.empty_captions == "refuse":
            raise BadSampleError(
                f"{where}: the caption is empty; set data.empty_captions to 'keep' to train on samples "
                "without words."
            )
        return caption


def _captions_of(value: dict[str, Any], fields: Sequence[str], where: str) -> list[str]:
    """The captions that the fields hold, without empty ones."""
    found: list[str] = []
    for name in fields:
        held = value.get(name, [])
        captions: list[Any] = held if isinstance(held, list) else [held]
        if not all(isinstance(caption, str) for caption in captions):
            raise BadSampleError(f"{where}: the json member has no string or strings named '{name}'.")
        found += [caption.strip() for caption in captions if caption.strip()]
    return found


def _sizes(fields: dict[str, Any], where: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """Original size and crop, as the json member says."""
    height, width, top, left = (_field(fields, name, int, where) for name in _SIZE_FIELDS)
    return (height, width), (top, left)


def _cropped_again(before: tuple[int, int], fitted: FittedImage | None) -> tuple[int, int]:
    """Where a crop lies that was resized and cropped once more on reading; latents are taken as they are."""
    if fitted is None:
        return before
    top, left = (
        round(place * scale) + place_again
        for place, scale, place_again in zip(before, fitted.scale, fitted.crop, strict=True)
    )
    return top, left


def _conditioned(condition: ImageCondition, pixels: NDArray[np.uint8], where: str) -> NDArray[np.uint8]:
    made = condition(np.ascontiguousarray(pixels))
    if made.dtype != np.uint8 or made.shape != pixels.shape:
        raise ValueError(
            f"{where}: data.condition made {made.dtype} {made.shape} of a picture of {pixels.shape}, but a condition "
            "image is uint8 of the picture's shape."
        )
    return np.ascontiguousarray(made)  # torch takes no array of negative strides


def _field(decoded: dict[str, Any], name: str, kind: type, where: str) -> Any:
    if not isinstance(decoded.get(name), kind):
        raise BadSampleError(f"{where}: the json member has no {kind.__name__} named '{name}'.")
    return decoded[name]
