"""A torchmetrics Metric whose states are sums, synchronised by all-reduce."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class SummedMetric(Metric):
    """Base of our metrics: every state is a float64 or int64 sum over samples.

    torchmetrics gathers each state from every rank to every rank before it adds them up; for the 2048 x 2048 sums of an
    Inception FID that took 32 s and 803 MB per rank on 8 gloo processes, against 0.55 s for an all-reduce of the same
    tensors. `compute` is therefore collective: all ranks call it, also those without a sample.
    """

    full_state_update = False
    higher_is_better: bool | None = None
    is_differentiable = False

    def add_sum(self, name: str, shape: tuple[int, ...] = (), dtype: torch.dtype = torch.float64) -> None:
        """Register a state that starts at zero."""
        self.add_state(name, torch.zeros(shape, dtype=dtype), dist_reduce_fx="sum")

    def _sync_dist(
        self, dist_sync_fn: Callable[..., Any] | None = None, process_group: Any | None = None
    ) -> None:
        """Replace each state by its sum over the ranks (`unsync` restores the local one)."""
        for name in self._reductions:
            total: Tensor = getattr(self, name).clone()
            torch.distributed.all_reduce(total, group=process_group or self.process_group)
            setattr(self, name, total)
