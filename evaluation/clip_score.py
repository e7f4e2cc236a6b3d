"""CLIP score: how well images fit their captions in the eyes of a CLIP model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from evaluation.features import FrozenClip
from evaluation.summed import SummedMetric


class ClipScore(SummedMetric):
    """Mean of 100 * cos(image, caption), not clamped at zero.

    Args:
        clip: the judge; its weights are in no checkpoint.

    Source: Hessel et al., arXiv:2104.08718, without its factor 2.5; the scale of the SDXS, BK-SDM and DMD2 tables.
    """

    higher_is_better = True
    total: Tensor
    count: Tensor

    def __init__(self, clip: FrozenClip) -> None:
        super().__init__()
        self.clip = clip
        self.add_sum("total")
        self.add_sum("count", dtype=torch.int64)

    def update(self, images_uint8: Tensor, captions: Sequence[str]) -> None:
        """Add images (B,3,H,W) uint8 with their B captions; B may be 0.

        Raises:
            ValueError: unless there is one caption per image.
        """
        if len(images_uint8) != len(captions):
            raise ValueError(f"CLIP score of {len(images_uint8)} images with {len(captions)} captions")
        if len(captions) == 0:
            return
        self.total += 100 * self.clip.cosine(images_uint8, captions).double().sum()
        self.count += len(captions)

    def compute(self) -> Tensor:
        """The mean as a float64 scalar; collective under torch.distributed.

        Raises:
            ValueError: if no rank had an image.
        """
        if int(self.count) == 0:
            raise ValueError("CLIP score needs at least 1 image, got 0")
        return self.total / self.count
