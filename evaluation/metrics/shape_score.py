"""Shape score: how well the objects of a toy image fit the renderer's own masks of the stated shapes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from data.toy.shape_fit import shape_similarities
from evaluation.metrics.estimates import Estimate, mean_estimate, share_estimate
from evaluation.metrics.sampled import SampledMetric

CLEAN = 0.8
"""Similarity from which an object counts as cleanly drawn: 99 % of real images have no object below it."""


class ToyRenderer:
    """Stands for the toy world's renderer where a metric's network is named; there are no weights."""

    def identity(self) -> dict[str, str]:
        return {"network": "toy renderer", "clean": str(CLEAN)}

    def text_identity(self) -> dict[str, str]:
        return {}

    def to(self, device: torch.device) -> ToyRenderer:
        """Masks are fitted on the CPU."""
        return self


class ShapeScore(SampledMetric):
    """Mean similarity of the stated objects with the best-fitting mask, and share of images with every object above `CLEAN`.

    Unlike the attribute classifier, which names a muddled heart a heart, it falls with ragged outlines, holes, mixed colours
    and objects outside their half. 1 would be a noiseless mask; real images score 0.945.
    """

    higher_is_better = True
    names = ("shape_score", "clean_images")

    def measure(self, images_uint8: Tensor, captions: Sequence[str] | None = None) -> Tensor:
        """(B, 2) per image: mean and minimum over its objects.

        Raises:
            ValueError: without captions.
        """
        if captions is None:
            raise ValueError("the shape score needs the captions of the images")
        found = shape_similarities(images_uint8, captions).double()
        return torch.stack([found.mean(dim=1), found.amin(dim=1)], dim=1)

    def compute(self) -> dict[str, Tensor]:
        """Both as float64 scalars in [0, 1]; collective under torch.distributed.

        Raises:
            ValueError: if no rank had an image.
        """
        values = {name: found.value for name, found in self.estimate().items()}
        return {
            name: torch.tensor(value, dtype=torch.float64, device=self.device)
            for name, value in values.items()
        }

    def estimate(self) -> dict[str, Estimate]:
        rows = self.rows_of("fake")[0]
        if len(rows) == 0:
            raise ValueError("the shape score needs at least 1 image, got 0")
        return {
            "shape_score": mean_estimate(rows[:, 0]).within(0.0, 1.0),
            "clean_images": share_estimate(rows[:, 1] >= CLEAN),
        }
