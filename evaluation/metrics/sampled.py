"""Metrics that keep one row per image, which allows dropping duplicates and computing intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from evaluation.metrics.collectives import NO_ID, all_gather_rows, first_positions, own_share
from evaluation.metrics.estimates import Estimate, mean_estimate


class SampledMetric(Metric):
    """Base class of metrics whose state is one row per image with its sample id.

    Rows stay on the CPU. A repeated id, on one rank or several, counts once, so the padding of a distributed sampler has no
    effect; images without ids all count. Rows are sorted by id before computing, so the result depends neither on the batch
    size nor on the number of ranks. `compute` and `estimates` are collective: all ranks call them, including empty ones.

    Subclasses implement `measure`, which returns the rows. Metrics of the same network share the work: call `measure` once,
    then `add` the rows to each.

    Args:
        sides: "fake", and "real" for metrics that compare two sets.
    """

    full_state_update = False
    higher_is_better: bool | None = None
    is_differentiable = False
    row_dtype = torch.float64
    """Dtype of the rows; a rank without images needs it too."""
    names: tuple[str, ...] = ()
    """Names of the results."""

    def __init__(self, sides: tuple[str, ...] = ("fake",)) -> None:
        super().__init__()
        self.sides = sides
        for side in sides:
            self.add_state(f"{side}_rows", [], dist_reduce_fx="cat")
            self.add_state(f"{side}_ids", [], dist_reduce_fx="cat")

    @property
    def source(self) -> object:
        """The network that `measure` calls; metrics with the same source can share rows."""
        return self

    def measure(self, images_uint8: Tensor, captions: Sequence[str] | None = None) -> Tensor:
        """Rows (B, k) from (B,3,H,W) uint8 images, and from captions if the metric reads them."""
        raise NotImplementedError

    def update(
        self,
        images_uint8: Tensor,
        captions: Sequence[str] | None = None,
        sample_ids: Tensor | Sequence[int] | None = None,
        real: bool = False,
    ) -> None:
        """Add images.

        Args:
            images_uint8: (B,3,H,W), uint8; B may be 0.
            captions: B captions, for metrics that read them.
            sample_ids: (B,) int64, not negative; None if images cannot repeat.
            real: whether the images belong to the real side.

        Raises:
            ValueError: for a wrong number of captions or ids, or for a side that the metric does not have.
        """
        if captions is not None and len(captions) != len(images_uint8):
            raise ValueError(f"{self.title} of {len(images_uint8)} images with {len(captions)} captions")
        if len(images_uint8) > 0:
            self.add(self.measure(images_uint8, captions), sample_ids, real)

    def add(self, rows: Tensor, sample_ids: Tensor | Sequence[int] | None = None, real: bool = False) -> None:
        """Add rows (B, k) returned by `measure`, possibly in an earlier run; other arguments as in `update`."""
        side = "real" if real else "fake"
        if side not in self.sides:
            raise ValueError(
                f"{side} images given to a {type(self).__name__} that was built with reference statistics"
                if real and "fake" in self.sides
                else f"{type(self).__name__} has no {side} side"
            )
        ids = torch.arange(len(rows)) if sample_ids is None else torch.as_tensor(sample_ids).cpu()
        if len(ids) != len(rows) or bool((ids < 0).any()):
            raise ValueError(
                f"{self.title} of {len(rows)} images with {len(ids)} sample ids; one each is needed, none negative"
            )
        if not torch.isfinite(rows).all():
            raise ValueError(
                f"{self.title}: the network's output is not finite; check its weights and the images"
            )
        self._computed = None  # torchmetrics' cached result
        self._update_count += 1
        rows = rows.detach().to(self.row_dtype)
        if sample_ids is None:
            return self._keep(side, rows, None)
        new = first_positions(ids)
        for known in getattr(self, f"{side}_ids"):  # at most one tensor
            new &= ~torch.isin(ids, known.cpu())
        return self._keep(side, rows[new.to(rows.device)], ids[new].long())

    def _keep(self, side: str, rows: Tensor, ids: Tensor | None) -> None:
        """Store rows (B, k) with their ids (B,); None for images without ids."""
        getattr(self, f"{side}_rows").append(rows.cpu())
        ids = torch.full((len(rows),), NO_ID) if ids is None else ids
        before = getattr(self, f"{side}_ids")
        setattr(self, f"{side}_ids", [torch.cat([*before, ids.to(before[0].device)]) if before else ids])

    @property
    def title(self) -> str:
        """Name of the metric in messages."""
        return self.names[0] if self.names else type(self).__name__

    def rows_of(self, side: str) -> tuple[Tensor, Tensor]:
        """Rows (n, k) and ids (n,) of one side, sorted by id."""
        parts = getattr(self, f"{side}_rows")
        if not parts:
            return torch.zeros(0, 0, dtype=self.row_dtype), torch.zeros(0, dtype=torch.int64)
        rows = torch.cat([part.cpu() for part in parts])
        ids = torch.cat([part.cpu() for part in getattr(self, f"{side}_ids")])
        order = ids.argsort(stable=True)
        return rows[order], ids[order]

    def estimates(self) -> dict[str, Estimate]:
        """Estimates by name; collective."""
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=self._to_sync):
            return self.estimate()

    def estimate(self) -> dict[str, Estimate]:
        """Implementation of `estimates`, called after the ranks have exchanged their rows."""
        raise NotImplementedError

    def _sync_dist(
        self, dist_sync_fn: Callable[..., Any] | None = None, process_group: Any | None = None
    ) -> None:
        """Keep each row on one rank only, then call `_exchange`."""
        group = process_group or self.process_group
        for side in self.sides:
            self._exchange(side, own_share(self.rows_of(side)[1], self.device, group), group)

    def _exchange(self, side: str, kept: Tensor, group: Any | None) -> None:
        """All-gather the kept rows of `rows_of`; suitable for small rows."""
        rows, ids = (each[kept] for each in self.rows_of(side))
        both = [torch.cat(all_gather_rows(each, self.device, group)) for each in (rows, ids.unsqueeze(1))]
        setattr(self, f"{side}_rows", [both[0]])
        setattr(self, f"{side}_ids", [both[1].squeeze(1)])


class PerImageMetric(SampledMetric):
    """Mean of the rows (B, 1), float64, that `measure` returns, with a normal 95 % interval."""

    bounds: tuple[float, float] = (-math.inf, math.inf)
    """Least and largest value that an image can have."""

    @property
    def count(self) -> int:
        """Number of images on this rank without duplicates."""
        return len(self.rows_of("fake")[0])

    def compute(self) -> Tensor:
        """The mean as a float64 scalar; collective under torch.distributed.

        Raises:
            ValueError: if no rank had an image.
        """
        return torch.tensor(self.estimate()[self.names[0]].value, dtype=torch.float64, device=self.device)

    def estimate(self) -> dict[str, Estimate]:
        rows, ids = self.rows_of("fake")
        if len(rows) == 0:
            raise ValueError(f"{self.title} needs at least 1 image, got 0")
        return {
            name: mean_estimate(rows[:, column], ids).within(*self.bounds)
            for column, name in enumerate(self.names)
        }
