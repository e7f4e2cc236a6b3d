"""Averages gradients over all ranks while the backward pass that makes them goes on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET_BYTES = 25 * 2**20
"""Gradients sent by one all-reduce, as in DDP: enough to use a network's bandwidth, and the first are ready early."""


class GradientAverage:
    """Averages the gradients of some networks over all ranks; for parameters that FSDP2 does not shard.

    DDP's reducer would send the gradients of all networks after every backward pass. This sends those of the networks that are
    updated next, in their last backward pass before the update. Gradients are grouped into buckets in the order of their
    arrival; when a bucket is complete, its all-reduce starts and the backward pass goes on. All ranks send the buckets in the
    same order. The first pass has no overlap: it finds out the order of arrival, and takes that of rank 0 for all.

    Args:
        parameters: trained parameters, at least one; their hooks stay registered.

    Source: the design of DDP's reducer: Li et al., "PyTorch distributed", arXiv:2006.15704, section 3.2.3.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        self._arrived: list[int] = []
        self._buckets: list[list[int]] = []
        self._missing: list[set[int]] = []
        """Per bucket: the parameters whose gradients have not arrived in this backward pass."""
        self._bucket_of: dict[int, int] = {}
        self._overlapping = False
        self._sent: list[tuple[dist.Work, Tensor]] = []
        self._next = 0
        for index, parameter in enumerate(self._parameters):
            parameter.register_post_accumulate_grad_hook(partial(self._arrive, index))

    @contextmanager
    def overlapping(self) -> Iterator[None]:
        """Context of the last backward pass before the update; `finish` ends what it starts."""
        self._overlapping = True
        try:
            yield
        finally:
            self._overlapping = False

    @torch.no_grad()
    def finish(self) -> None:
        """Waits until all gradients are averaged; sends those of incomplete buckets, which had no gradient in this pass."""
        if not self._buckets:
            self._group_by_arrival()
        while self._next < len(self._buckets):
            self._send()
        for work, _ in self._sent:
            _wait(work)
        if self._sent:
            torch._foreach_div_([flat for _, flat in self._sent], dist.get_world_size())
        self._sent, self._next = [], 0
        self._missing = [set(bucket) for bucket in self._buckets]

    def _arrive(self, index: int, parameter: Tensor) -> None:
        if not self._overlapping:
            return
        if not self._buckets:
            self._arrived.append(index)
            return
        missing = self._missing[self._bucket_of[index]]
        # Its bucket may be on its way already; reentrant gradient checkpointing would do this.
        assert index in missing, "a gradient was accumulated twice in one backward pass"
        missing.remove(index)
        while self._next < len(self._buckets) and not self._missing[self._next]:
            self._send()

    @torch.no_grad()
    def _send(self) -> None:
        """Starts the all-reduce of the next bucket; its gradients become views of what is sent, and need no further copy."""
        members = [self._parameters[index] for index in self._buckets[self._next]]
        self._next += 1
        members = [parameter for parameter in members if parameter.grad is not None]
        if not members:
            return
        flat = members[0].new_empty(sum(map(torch.numel, members)))
        views = _views(flat, members)
        torch._foreach_copy_(views, [parameter.grad for parameter in members if parameter.grad is not None])
        for parameter, view in zip(members, views, strict=True):
            parameter.grad = view
        work = dist.all_reduce(flat, async_op=True)
        assert work is not None
        self._sent.append((work, flat))

    def _group_by_arrival(self) -> None:
        order = [[*dict.fromkeys([*self._arrived, *range(len(self._parameters))])]]
        dist.broadcast_object_list(order)
        room = 0
        for index in order[0]:
            parameter = self._parameters[index]
            last = self._parameters[self._buckets[-1][-1]] if self._buckets else None
            if last is None or last.dtype != parameter.dtype or room < parameter.nbytes:
                self._buckets.append([])
                room = BUCKET_BYTES
            self._buckets[-1].append(index)
            self._bucket_of[index] = len(self._buckets) - 1
            room -= parameter.nbytes


def _wait(work: dist.Work) -> None:
    """Waits for a collective; if it failed, raises what tells a lost rank from a bug (`run_ends.lost_rank`)."""
    try:
        work.wait()
    except RuntimeError as error:  # of gloo, without a type of its own
        raise dist.DistError(str(error)) from error


def _views(flat: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Consecutive parts of `flat` with the shapes and strides of the parameters, which may be channels_last."""
    views, start = [], 0
    for parameter in parameters:
        strides = torch.empty_like(parameter, device="meta").stride()
        views.append(flat.as_strided(parameter.shape, strides, start))
        start += parameter.numel()
    return views
