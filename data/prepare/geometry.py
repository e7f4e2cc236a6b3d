"""Where a picture goes when it is resized and cropped; the same rule as the reader's for squares, so that both tell SDXL the
same sizes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
        """The picture, resized by Lanczos and cropped."""
        height, width = self.resized
        if (image.height, image.width) != self.resized:
            image = image.resize((width, height), Image.Resampling.LANCZOS)
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


def aspect_buckets(resolution: int, step: int, max_aspect: float = 2.1) -> list[Size]:
    """Sizes of about the same area and of different aspect.

    SDXL (arXiv:2307.01952, section 2.3) trains on sizes of about 1024^2 pixels in multiples of 64. For every height in steps
    from the narrowest to the widest the largest width that stays within the area.

    Args:
        resolution: side of the square among them, a multiple of step.
        step: what every side is a multiple of.
        max_aspect: longer by shorter side, at most; 2.1 lets 704x1472 of SDXL's sizes in, 2 would end at 768x1344.

    Returns:
        heights and widths, from wide to tall.
    """
    sizes = set[Size]()
    for short in range(step, resolution + 1, step):
        long = resolution * resolution // short // step * step
        if long <= short * max_aspect:
            sizes |= {(short, long), (long, short)}
    return sorted(sizes)


def nearest_aspect(size: Size, sizes: Sequence[Size]) -> Size:
    """Of several sizes the one whose aspect is nearest, by ratio; the first of two that are equally near."""
    aspect = math.log(size[0] / size[1])
    return min(sizes, key=lambda one: abs(math.log(one[0] / one[1]) - aspect))
