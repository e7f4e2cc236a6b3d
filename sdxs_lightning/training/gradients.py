"""Gradients of one network: their average over ranks, their norm, and clipping; for plain and for sharded parameters."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.distributed.tensor import DTensor

CHUNK_ELEMENTS = 32 * 1024 * 1024
"""At most 128 MiB of float32 are copied together for one message."""


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replaces the gradients by their mean over all ranks; for DDP, since FSDP2 averages while it scatters.

    DDP's own reducer sends the gradients of every network after every backward, whichever was trained; this sends those of
    one network once an update. What it gives up is the overlap with the backward pass.
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
    """Scales the gradients so that their common 2-norm is at most max_norm, and returns the norm before.

    The norm of sharded gradients is a partial sum on each rank; clipping reduces it once more than plain clipping does,
    and never waits for the device.

    Args:
        parameters: of one network; those without a gradient are passed over.
        max_norm: None only measures.

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
