"""Bit-exact reimplementations of the resizing in common evaluation tools, on any device.

Pillow resamples along one axis after the other: each output pixel is a weighted sum of the inputs within the support of the
filter, which widens with the scale, and the weights are normalised to sum 1 (also at the border). For 8-bit images the
weights are integers with 22 fractional bits and each axis is rounded to a byte. Float64 represents all of this exactly, so a
matrix product gives Pillow's bytes on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

Filter = Literal["box", "bilinear", "bicubic", "lanczos"]

_BITS = 22


def _bicubic(x: float) -> float:
    """Keys' cubic with a = -0.5."""
    x = abs(x)
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1
    return ((-0.5 * x + 2.5) * x - 4) * x + 2 if x < 2 else 0.0


def _lanczos(x: float) -> float:
    return float(np.sinc(x) * np.sinc(x / 3)) if -3 <= x < 3 else 0.0


def _box(x: float) -> float:
    return 1.0 if -0.5 < x <= 0.5 else 0.0


def _triangle(x: float) -> float:
    return max(0.0, 1 - abs(x))


FILTERS: dict[Filter, tuple[Callable[[float], float], float, Image.Resampling]] = {
    "box": (_box, 0.5, Image.Resampling.BOX),
    "bilinear": (_triangle, 1.0, Image.Resampling.BILINEAR),
    "bicubic": (_bicubic, 2.0, Image.Resampling.BICUBIC),
    "lanczos": (_lanczos, 3.0, Image.Resampling.LANCZOS),
}
"""Function, support in source pixels at scale 1, Pillow's constant."""


@lru_cache(maxsize=32)
def resampling_weights(size: int, target: int, kind: Filter) -> Tensor:
    """Pillow's weights as a matrix (target, size), float64, rows of sum 1."""
    function, support, _ = FILTERS[kind]
    scale = size / target
    stretch = max(scale, 1.0)
    reach = support * stretch
    matrix = torch.zeros(target, size, dtype=torch.float64)
    for row in range(target):
        centre = (row + 0.5) * scale
        first, end = max(int(centre - reach + 0.5), 0), min(int(centre + reach + 0.5), size)
        weights = [function((x - centre + 0.5) / stretch) for x in range(first, end)]
        total = sum(weights)
        matrix[row, first:end] = torch.tensor([weight / total for weight in weights], dtype=torch.float64)
    return matrix


def resize_uint8(images_uint8: Tensor, size: tuple[int, int], kind: Filter) -> Tensor:
    """Pillow's `Image.resize` for 8-bit RGB images, bit-exact: Pillow itself on the CPU, its arithmetic on other devices.

    Args:
        images_uint8: (B,3,H,W), uint8.
        size: height, width.
        kind: name of the filter.

    Returns:
        (B,3,*size), uint8, same device; the input itself if it has that size.
    """
    if images_uint8.shape[-2:] == size:
        return images_uint8
    if images_uint8.device.type != "cpu":
        return resize_by_pillows_arithmetic(images_uint8, size, kind)
    arrays = images_uint8.permute(0, 2, 3, 1).contiguous().numpy()
    resampling = FILTERS[kind][2]
    resized = [np.asarray(Image.fromarray(array).resize(size[::-1], resampling)) for array in arrays]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).contiguous()


def resize_by_pillows_arithmetic(images_uint8: Tensor, size: tuple[int, int], kind: Filter) -> Tensor:
    """`resize_uint8` in integer arithmetic in float64."""
    images = images_uint8
    for axis in (-1, -2):  # Pillow's order: rows first
        if images.shape[axis] == size[axis]:
            continue
        weights = resampling_weights(images.shape[axis], size[axis], kind) * (1 << _BITS)
        # Rounded half away from zero, as C's int(0.5 + x) and int(-0.5 + x).
        weights = (weights.sign() * (weights.abs() + 0.5).floor()).to(images.device)
        sums = _along(images.double(), weights, axis)
        images = ((sums + (1 << (_BITS - 1))) / (1 << _BITS)).floor().clamp(0, 255).to(torch.uint8)
    return images


def resize_float(images_uint8: Tensor, size: tuple[int, int], kind: Filter) -> Tensor:
    """Pillow's resize of float images (mode F) per channel, neither rounded nor clamped, as in clean-fid.

    Returns:
        (B,3,*size), float32, same device.
    """
    images = images_uint8.float()
    for axis in (-1, -2):
        if images.shape[axis] != size[axis]:
            weights = resampling_weights(images.shape[axis], size[axis], kind).to(images.device)
            images = _along(images.double(), weights, axis).float()
    return images


def _along(images: Tensor, weights: Tensor, axis: int) -> Tensor:
    return images @ weights.T if axis == -1 else weights @ images


def resize_bilinear_tf1(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resize of TensorFlow 1, used in the definition of FID: top-left aligned, no antialiasing.

    Args:
        images: (B,C,H,W), float32.
        size: height, width.

    Returns:
        (B,C,*size), float32.
    """
    for axis in (-1, -2):
        length = images.shape[axis]
        positions = torch.arange(size[axis], dtype=torch.float32, device=images.device)
        positions = positions * torch.tensor(length / size[axis], dtype=torch.float32)
        low = positions.long()
        fractions = positions - low
        if axis == -2:
            fractions = fractions.unsqueeze(1)
        lower = images.index_select(axis, low)
        upper = images.index_select(axis, (low + 1).clamp_max(length - 1))
        images = lower + (upper - lower) * fractions
    return images


def centre_square(images: Tensor) -> Tensor:
    """The largest centred square of (...,H,W), with torchvision's rounding of the offset."""
    side = min(images.shape[-2:])
    top, left = (round((length - side) / 2) for length in images.shape[-2:])
    return images[..., top : top + side, left : left + side]


def resize_shortest_and_crop(images_uint8: Tensor, px: int, kind: Filter = "bicubic") -> Tensor:
    """Torchvision's Resize(px) and CenterCrop(px) for 8-bit Pillow images."""
    height, width = images_uint8.shape[-2:]
    longest = int(px * max(height, width) / min(height, width))
    resized = resize_uint8(images_uint8, (px, longest) if height <= width else (longest, px), kind)
    top, left = (round((length - px) / 2) for length in resized.shape[-2:])
    return resized[..., top : top + px, left : left + px]
