"""Augmentation of a discriminator's images: crop, colour, translation, cutout. All differentiable.

The caller passes the random numbers, in [0, 1), drawn per sample position: real and fake images of one position get the same
augmentation, and a resumed run equals an uninterrupted one. No function synchronises with the device.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sdxs_lightning.objectives.pixel_adversarial import Augmentation

NUMBERS = 7
"""Random numbers per image: brightness, saturation, contrast, shift down, shift right, row and column of the cutout."""


def augment(images: Tensor, numbers: Tensor, settings: Augmentation) -> Tensor:
    """Applies colour, translation and cutout in this order; a setting of None skips its step.

    Args:
        images: (B, 3, H, W), float, in [-1, 1].
        numbers: (B, 7), float in [0, 1).
        settings: ranges of the augmentations.

    Returns:
        (B, 3, H, W), float32, differentiable; values may leave [-1, 1].

    Source: DiffAugment, arXiv:2006.10738, section 3.2.
    """
    images = images.float()
    if settings.colour is not None:
        images = recolour(images, numbers[:, :3], settings.colour)
    if settings.translation is not None:
        images = shift(images, numbers[:, 3:5], settings.translation)
    if settings.cutout is not None:
        images = cover(images, numbers[:, 5:7], settings.cutout)
    return images


def recolour(images: Tensor, numbers: Tensor, strength: float) -> Tensor:
    """Changes brightness, then saturation about each pixel's grey, then contrast about each image's mean.

    Args:
        images: (B, 3, H, W), float.
        numbers: (B, 3), float in [0, 1); 0.5 changes nothing.
        strength: 1 gives brightness +-0.5, saturation 1 +- 1 and contrast 1 +- 0.5.
    """
    by = strength * (2 * numbers - 1)
    brightness, saturation, contrast = (
        (by * by.new_tensor([0.5, 1.0, 0.5])).view(-1, 3, 1, 1, 1).unbind(dim=1)
    )
    images = images + brightness
    grey = images.mean(dim=1, keepdim=True)
    images = grey + (1 + saturation) * (images - grey)
    middle = images.mean(dim=(1, 2, 3), keepdim=True)
    return middle + (1 + contrast) * (images - middle)


def shift(images: Tensor, numbers: Tensor, share: float) -> Tensor:
    """Translates each image by at most round(share * side) pixels along each axis, padding with grey (0).

    Args:
        images: (B, C, H, W), float.
        numbers: (B, 2), float in [0, 1): 0 is the largest shift down or right, 1 the largest up or left.
        share: largest shift as a share of the side.
    """
    height, width = images.shape[-2:]
    most_down, most_right = round(share * height), round(share * width)
    padded = F.pad(images, (most_right, most_right, most_down, most_down))
    return cut_windows(padded, numbers, height, width)


def cover(images: Tensor, numbers: Tensor, share: float) -> Tensor:
    """Cutout: sets a rectangle of each image to grey (0), clipped at the borders.

    Args:
        images: (B, C, H, W), float.
        numbers: (B, 2), float in [0, 1): row and column of the centre, as shares of the sides.
        share: sides of the rectangle as a share of the image's, rounded to pixels.
    """
    covered = []
    for side, centre in zip(images.shape[-2:], numbers.unbind(dim=1), strict=True):
        length = round(share * side)
        first = (centre * (side + 1 - length % 2)).long() - length // 2
        pixels = torch.arange(side, device=images.device)
        covered.append((pixels >= first[:, None]) & (pixels < first[:, None] + length))
    rows, columns = covered
    return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0.0)


def cut_squares(images: Tensor, places: Tensor, side_px: int) -> Tensor:
    """Crops a square from each image at its own place; differentiable.

    Args:
        images: (B, C, H, W), float.
        places: (B, 2), float in [0, 1): top and left, as shares of their possible range.
        side_px: side of the squares.

    Returns:
        (B, C, side_px, side_px).

    Raises:
        ValueError: if the images are smaller than the squares.
    """
    height, width = images.shape[-2:]
    if min(height, width) < side_px:
        raise ValueError(
            f"crop_px of the GAN is {side_px} and the images are only {height}x{width}; make it smaller, or null."
        )
    return cut_windows(images, places, side_px, side_px)


def cut_windows(images: Tensor, places: Tensor, height_px: int, width_px: int) -> Tensor:
    """Like `cut_squares`, for rectangles (B, C, height_px, width_px) no larger than the images."""
    height, width = images.shape[-2:]
    down, right = places.unbind(dim=1)
    # Numbers, not a tensor of them, whose copy to the device would wait for it.
    top, left = (down * (height - height_px + 1)).long(), (right * (width - width_px + 1)).long()
    rows = top[:, None] + torch.arange(height_px, device=images.device)
    columns = left[:, None] + torch.arange(width_px, device=images.device)
    strips = images.take_along_dim(rows.view(len(images), 1, height_px, 1), dim=2)
    return strips.take_along_dim(columns.view(len(images), 1, 1, width_px), dim=3)
