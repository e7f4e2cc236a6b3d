"""Resizing and cropping by the reader's rule, so that SDXL is conditioned on the same sizes either way.

The reader resizes by torch's bicubic kernel; here it is Pillow's, which differs from it by at most 1 of 255 and gives the same
bytes on every processor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from PIL import Image

from data.shards.order.buckets import Size

_MAX_SIDE = 1 << 20  # pixels; a number beyond it in a json member is none of an image


class ResizeAndCrop(NamedTuple):
    """How an image reaches a given size. Pixels."""

    resized: Size
    top: int
    left: int
    target: Size

    def apply(self, image: Image.Image) -> Image.Image:
        """The image, resized and cropped."""
        height, width = self.resized
        if (image.height, image.width) != self.resized:
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        if self.target == self.resized:
            return image
        return image.crop((self.left, self.top, self.left + self.target[1], self.top + self.target[0]))


def resize_to_cover(size: Size, target: Size) -> ResizeAndCrop:
    """The smallest resize that covers the target, and a centre crop."""
    height, width = size
    scale = max(target[0] / height, target[1] / width)
    resized = max(target[0], round(height * scale)), max(target[1], round(width * scale))
    return ResizeAndCrop(resized, (resized[0] - target[0]) // 2, (resized[1] - target[1]) // 2, target)


def resize_shorter_side(size: Size, pixels: int) -> ResizeAndCrop:
    """Resizes the shorter side to a number of pixels, and crops nothing."""
    height, width = size
    scale = pixels / min(size)
    resized = max(pixels, round(height * scale)), max(pixels, round(width * scale))
    return ResizeAndCrop(resized, 0, 0, resized)


def size_fields(fields: Mapping[str, Any], size: Size, step: ResizeAndCrop) -> dict[str, int]:
    """Original size, crop and size of an image for its json member, in pixels; SDXL is conditioned on them.

    Args:
        fields: the json so far. Original sizes in it are kept (img2dataset and `data.prepare` write them); a crop in it is
            added, since what an earlier step cut off lies outside the image of this one.
        size: of the image before this step.
        step: this step.

    Returns:
        crop_top and crop_left are in pixels of the resized image, as in SDXL's own training.
    """
    original = _number(fields, "original_height"), _number(fields, "original_width")
    height, width = original if all(original) else size
    return {
        "original_height": height,
        "original_width": width,
        "crop_top": step.top + round(_number(fields, "crop_top") * step.resized[0] / size[0]),
        "crop_left": step.left + round(_number(fields, "crop_left") * step.resized[1] / size[1]),
        "height": step.target[0],
        "width": step.target[1],
    }


def _number(fields: Mapping[str, Any], name: str) -> int:
    value = fields.get(name)
    return value if type(value) is int and 0 < value <= _MAX_SIDE else 0
