"""Base class of metrics that need the features of both sets rather than their moments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from evaluation.metrics.collectives import all_gather_rows, collective_device, gather_rows, global_rank
from evaluation.metrics.estimates import GROUPS, Estimate
from evaluation.metrics.sampled import SampledMetric


class FeatureSetMetric(SampledMetric):
    """Gathers the features of both sides on the first rank, which computes and broadcasts the results.

    Args:
        features: a feature network, or any callable from (B,3,H,W) uint8 images to (B, d) float32 features.
        reference: features (n, d) of the real images; None to give the real images with `update(..., real=True)`.
        names: names of the results.
    """

    row_dtype = torch.float32
    least = 2
    """Smallest number of images on each side."""

    def __init__(
        self, features: Callable[[Tensor], Tensor], reference: Tensor | None, names: tuple[str, ...]
    ) -> None:
        super().__init__(("fake", "real") if reference is None else ("fake",))
        self.features, self.reference, self.names = features, reference, names
        self._counts: dict[str, int] = {}

    @property
    def source(self) -> object:
        return self.features

    def measure(self, images_uint8: Tensor, captions: Sequence[str] | None = None) -> Tensor:
        return self.features(images_uint8)

    def between(self, fake: Tensor, real: Tensor) -> list[Estimate]:
        """Results in the order of `names` from features (n, d) and (m, d), on the CPU or the metric's device."""
        raise NotImplementedError

    def compute(self) -> Tensor | dict[str, Tensor]:
        """A float64 scalar, or a dict of them for several results; collective.

        Raises:
            ValueError: for too few images, on every rank.
        """
        found = {
            name: torch.tensor(estimate.value, dtype=torch.float64, device=self.device)
            for name, estimate in self.estimate().items()
        }
        return found if len(found) > 1 else found[self.names[0]]

    def estimate(self) -> dict[str, Estimate]:
        for side in self.sides:
            count = self._counts[side] if self._is_synced else len(self.rows_of(side)[0])
            if count < self.least:
                raise ValueError(f"{self.title} needs at least {self.least} {side} images, got {count}")
        if not self._is_synced:
            return dict(zip(self.names, self._between(), strict=True))
        return self._broadcast()

    def _between(self) -> list[Estimate]:
        fake = self.rows_of("fake")[0].to(self.device)
        real = self.rows_of("real")[0] if self.reference is None else self.reference
        return self.between(fake, real.to(self.device))

    def _broadcast(self) -> dict[str, Estimate]:
        """Compute on the first rank and broadcast."""
        blank = float("nan")
        table = torch.full((len(self.names), 5 + GROUPS), blank, dtype=torch.float64)
        if dist.get_rank(self.process_group) == 0:
            for row, each in enumerate(self._between()):
                cells = (each.value, each.samples, each.low, each.high, each.infinity, *(each.left_out or ()))
                filled = [blank if cell is None else float(cell) for cell in cells]
                table[row, : len(filled)] = torch.tensor(filled, dtype=torch.float64)
        table = table.to(collective_device(self.device, self.process_group))
        dist.broadcast(table, src=global_rank(0, self.process_group), group=self.process_group)
        return {name: _estimate(row) for name, row in zip(self.names, table.tolist(), strict=True)}

    def _exchange(self, side: str, kept: Tensor, group: Any | None) -> None:
        """Gather all rows on the first rank."""
        rows, ids = (each[kept] for each in self.rows_of(side))
        count = torch.tensor([[len(rows)]])
        self._counts[side] = int(torch.cat(all_gather_rows(count, self.device, group)).sum())
        setattr(self, f"{side}_rows", [gather_rows(rows, self.device, group)])
        setattr(self, f"{side}_ids", [gather_rows(ids.unsqueeze(1), self.device, group).squeeze(1)])


def _estimate(row: list[float]) -> Estimate:
    value, samples, *rest = row
    low, high, infinity = (None if cell != cell else cell for cell in rest[:3])
    left_out = None if rest[3] != rest[3] else tuple(rest[3:])
    return Estimate(value, int(samples), low, high, infinity, left_out)
