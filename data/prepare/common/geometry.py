"""Where a picture goes when it is resized and cropped: the reader's rule, so that both tell SDXL the same sizes.

The reader resizes by torch's bicubic kernel; here it is Pillow's, which differs from it by at most 1 of 255 and gives the same
bytes on every processor.
"""

from __future__ import annotations

from typing import NamedTuple

from PIL import Image

Size = tuple[int, int]
"""Height, width in pixels."""


class Fit(NamedTuple):
    """How a picture becomes one of a given size: resized, then cut out. Pixels."""

    resized: Size
    top: int
    left: int
    target: Size

    def apply(self, image: Image.Image) -> Image.Image:
        """The picture, resized and cropped."""
        height, width = self.resized
        if (image.height, image.width) != self.resized:
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        if self.target == self.resized:
            return image
        return image.crop((self.left, self.top, self.left + self.target[1], self.top + self.target[0]))


def fill(size: Size, target: Size) -> Fit:
    """The picture made as small as still covers the target, then its middle."""
    height, width = size
    scale = max(target[0] / height, target[1] / width)
    resized = max(target[0], round(height * scale)), max(target[1], round(width * scale))
    return Fit(resized, (resized[0] - target[0]) // 2, (resized[1] - target[1]) // 2, target)


def shorter_side(size: Size, pixels: int) -> Fit:
    """The whole picture with so many pixels on its shorter side."""
    height, width = size
    scale = pixels / min(size)
    resized = max(pixels, round(height * scale)), max(pixels, round(width * scale))
    return Fit(resized, 0, 0, resized)
