"""Images of two original sizes and with crops, for bases that are conditioned on both (SDXL's micro-conditioning).

SDXL, arXiv:2307.01952, section 2.2: training images come in many sizes and are resized and cropped; conditioning the network
on that keeps blur and cropped objects out of its images for "original size = target size, no crop".
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sdxs_lightning.core.seeding import Stream, integers, uniform

PLAIN, SMALL = 0.6, 0.8
"""Thresholds of a uniform draw. Below the first: as rendered; between them: from half the size; above: cropped."""
MARGIN_PX = 8


class ImagesWithSizes(NamedTuple):
    """Images with the sizes that SDXL is conditioned on."""

    images_uint8: Tensor
    """(B, 3, H, W)."""
    original_sizes: Tensor
    """(B, 2), int64: height, width before resizing, in pixels."""
    crops: Tensor
    """(B, 2), int64: top, left of the crop in the resized image, in pixels."""


def vary_original_sizes(images_uint8: Tensor, index: Tensor) -> ImagesWithSizes:
    """Keeps 60 % unchanged, upsamples 20 % from half the resolution, and crops 20 % from an enlarged image.

    Args:
        images_uint8: (B, 3, H, W), images of the toy world.
        index: (B,), int64: their indices, which seed the choice.
    """
    side = images_uint8.shape[-1]
    images = images_uint8.float()
    kind = uniform(0, Stream.AUGMENTATION, index)
    small = F.interpolate(F.avg_pool2d(images, 2), size=side, mode="bilinear", align_corners=False)
    images = torch.where((kind >= PLAIN).view(-1, 1, 1, 1) & (kind < SMALL).view(-1, 1, 1, 1), small, images)
    sizes = torch.full((len(index), 2), side)
    sizes[(kind >= PLAIN) & (kind < SMALL)] = side // 2
    crops = torch.zeros(len(index), 2, dtype=torch.int64)
    corners = integers(1, Stream.AUGMENTATION, index, 0, (MARGIN_PX + 1) ** 2)
    for row in torch.nonzero(kind >= SMALL).flatten().tolist():
        top, left = divmod(int(corners[row]), MARGIN_PX + 1)
        enlarged = F.interpolate(
            images[row : row + 1], size=side + MARGIN_PX, mode="bilinear", align_corners=False
        )
        images[row] = enlarged[0, :, top : top + side, left : left + side]
        crops[row] = torch.tensor([top, left])
    return ImagesWithSizes(images.round().clamp(0, 255).to(torch.uint8), sizes, crops)
