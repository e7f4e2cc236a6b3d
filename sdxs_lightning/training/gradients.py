"""Norm and clipping of one network's gradients, plain or sharded."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def check_clip_norm(name: str, value: float | None) -> None:
    """Raises ValueError for a norm with which gradients would vanish (0) or change their sign (below 0)."""
    if value is not None and not value > 0:
        raise ValueError(f"{name} must be above 0, or null for no clipping, got {value}.")


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
    """Clips the gradients to a total 2-norm of max_norm, and returns the norm before clipping.

    The norm of sharded gradients is a partial sum on each rank and is all-reduced here, among the ranks that share a copy of
    the network. Does not synchronise with the device.

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
