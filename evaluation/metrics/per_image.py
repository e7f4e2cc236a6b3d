"""Metrics that give each image a number of its own; the result is their mean."""

from __future__ import annotations

import torch
from torch import Tensor

from evaluation.metrics.estimates import Estimate, mean_estimate
from evaluation.metrics.sampled import SampledMetric


class PerImageMetric(SampledMetric):
    """Mean over images of the rows (B, 1), float64, that `measure` gives; with a normal 95 % interval."""

    @property
    def count(self) -> int:
        """Images, duplicates left out: of this rank."""
        return len(self.rows_of("fake")[0])

    def compute(self) -> Tensor:
        """The mean as a float64 scalar; collective under torch.distributed.

        Raises:
            ValueError: if no rank had an image.
        """
        return torch.tensor(self.estimate()[self.names[0]].value, dtype=torch.float64, device=self.device)

    def estimate(self) -> dict[str, Estimate]:
        """See SampledMetric."""
        rows = self.rows_of("fake")[0]
        if len(rows) == 0:
            raise ValueError(f"{self.title} needs at least 1 image, got 0")
        return {name: mean_estimate(rows[:, column]) for column, name in enumerate(self.names)}
