"""Gathering rows across ranks, and finding rows that several ranks have."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

NO_ID = -1
"""Sample id of images added without one; never a duplicate."""


def collective_device(device: torch.device, group: Any | None = None) -> torch.device:
    """Device of tensors in collectives: the CPU for gloo, the metric's GPU for NCCL."""
    return torch.device("cpu") if dist.get_backend(group) == "gloo" else device


def all_gather_rows(rows: Tensor, device: torch.device, group: Any | None = None) -> list[Tensor]:
    """All-gather of rows (n_rank, k), in rank order; n_rank may differ between ranks and be 0."""
    padded, sizes = _padded(rows.to(collective_device(device, group)), group)
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)
    return [part[:size].cpu() for part, size in zip(parts, sizes, strict=True)]


def gather_rows(rows: Tensor, device: torch.device, group: Any | None = None) -> Tensor:
    """Rows (n_rank, k) of all ranks, concatenated on the first rank; other ranks get no rows."""
    padded, sizes = _padded(rows.to(collective_device(device, group)), group)
    first = dist.get_rank(group) == 0
    parts = [torch.empty_like(padded) for _ in sizes] if first else None
    dist.gather(padded, parts, dst=global_rank(0, group), group=group)
    if parts is None:
        return padded[:0].cpu()
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]).cpu()


def global_rank(rank: int, group: Any | None = None) -> int:
    """Global rank of a rank within a group."""
    return rank if group is None else dist.get_global_rank(group, rank)


def first_positions(sample_ids: Tensor) -> Tensor:
    """(n,) bool: True for the first row of each id, and for every row without one."""
    _, inverse = torch.unique(sample_ids, return_inverse=True)
    positions = torch.arange(len(sample_ids))
    first = torch.full((len(sample_ids),), len(sample_ids)).scatter_reduce(0, inverse, positions, "amin")
    return (first[inverse] == positions) | (sample_ids == NO_ID)


def own_share(sample_ids: Tensor, device: torch.device, group: Any | None = None) -> Tensor:
    """(n,) bool: rows of this rank that count, so that each id counts once over all ranks (on the lowest)."""
    parts = all_gather_rows(sample_ids.unsqueeze(1), device, group)
    kept = first_positions(torch.cat(parts).squeeze(1))
    start = sum(len(part) for part in parts[: dist.get_rank(group)])
    return kept[start : start + len(sample_ids)]


def _padded(rows: Tensor, group: Any | None) -> tuple[Tensor, list[int]]:
    """Rows padded to the longest rank's count, and the counts of all ranks; an empty rank receives the width."""
    shape = torch.tensor(rows.shape, device=rows.device)
    shapes = [torch.zeros_like(shape) for _ in range(dist.get_world_size(group))]
    dist.all_gather(shapes, shape, group=group)
    sizes = [int(each[0]) for each in shapes]
    padded = rows.new_zeros(max(sizes), max(int(each[1]) for each in shapes))
    if len(rows) > 0:
        padded[: len(rows)] = rows
    return padded, sizes
