"""Averaging over ranks, norm and clipping of one network's gradients; for plain and sharded parameters."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.distributed.tensor import DTensor

CHUNK_ELEMENTS = 32 * 1024 * 1024
"""Bucket size of an all-reduce: 128 MiB of float32."""


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Averages the gradients over all ranks, in place; for DDP, since FSDP2 averages in its reduce-scatter.

    DDP's reducer would send the gradients of all networks after every backward pass; this sends one network's gradients once
    per update, but does not overlap with the backward pass.
    """
    chunk: list[Tensor] = []
    for gradient in [parameter.grad for parameter in parameters if parameter.grad is not None]:
        if chunk and sum(map(torch.numel, chunk)) + gradient.numel() > CHUNK_ELEMENTS:
            _average(chunk)
            chunk = []
        chunk.append(gradient)
    if chunk:
        _average(chunk)


def _average(gradients: list[Tensor]) -> None:
    flat = _flatten_dense_tensors(gradients)
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    torch._foreach_copy_(gradients, list(_unflatten_dense_tensors(flat, gradients)))


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
    """Clips the gradients to a total 2-norm of max_norm, and returns the norm before clipping.

    The norm of sharded gradients is a partial sum on each rank and is all-reduced here. Does not synchronise with the device.

    Args:
        parameters: of one network; those without a gradient are ignored.
        max_norm: None does not clip.

    Returns:
        (), float32, the same on every rank.
    """
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if max_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm, foreach=True)
    return norm.detach()
