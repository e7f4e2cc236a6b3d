"""Sums of features in float64: what mean and covariance are computed from, and how ranks add them up."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from evaluation.metrics.collectives import global_rank
from evaluation.metrics.statistics import FeatureStatistics


class Sums(NamedTuple):
    """What mean and covariance are computed from; sums of two sets add up."""

    samples: Tensor
    """How many, int64."""
    total: Tensor
    """(d,), float64."""
    outer: Tensor
    """(d, d), float64."""

    @classmethod
    def of(cls, features: Tensor, dimensions: int, device: torch.device) -> Sums:
        """Of features (n, d), on a device; n may be 0."""
        total = torch.zeros(dimensions, dtype=torch.float64, device=device)
        outer = torch.zeros(dimensions, dimensions, dtype=torch.float64, device=device)
        sums = cls(torch.tensor(0, device=device), total, outer)
        sums.add(features)
        return sums

    def add(self, features: Tensor, chunk: int = 4096) -> None:
        """Add features (n, d) in place, in pieces that do not need much memory."""
        for part in features.split(chunk) if len(features) > 0 else ():
            part = part.to(self.outer.device).double()
            self.samples.add_(len(part))
            self.total.add_(part.sum(0))
            self.outer.addmm_(part.T, part)

    def subtract(self, other: Sums) -> None:
        """Take images out again, in place."""
        for own, others in zip(self, other, strict=True):
            own.sub_(others)

    def all_reduce(self, group: Any | None) -> None:
        """Add up over the ranks, in place."""
        dist.all_reduce(self.samples, group=group)
        dist.all_reduce(self.total, group=group)
        all_reduce_symmetric(self.outer, group)

    def reduce(self, rank: int, group: Any | None) -> None:
        """Add up over the ranks, on one of them; the others' are of no use afterwards."""
        for each in self:
            dist.reduce(each, dst=global_rank(rank, group), group=group)

    def without(self, other: Sums) -> Sums:
        """Of the images that are not among the others."""
        return Sums(self.samples - other.samples, self.total - other.total, self.outer - other.outer)

    def statistics(self) -> FeatureStatistics:
        """Mean and covariance."""
        count = int(self.samples)
        mean = self.total / count
        return FeatureStatistics(mean, (self.outer - count * torch.outer(mean, mean)) / (count - 1), count)


def all_reduce_symmetric(matrix: Tensor, group: Any | None = None, parts: int = 8) -> None:
    """Sum of a symmetric (d, d) matrix over the ranks, in place; a band of rows at a time, right of the diagonal.

    Nearly half of the bytes need not be sent, and gloo's copies are those of a band.
    """
    height = -(-len(matrix) // parts)
    for start in range(0, len(matrix), height):
        end = min(start + height, len(matrix))
        band = matrix[start:end, start:].contiguous()
        dist.all_reduce(band, group=group)
        matrix[start:end, start:] = band
        matrix[end:, start:end] = band[:, end - start :].T
