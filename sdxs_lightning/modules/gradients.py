"""Gradient norms and clipping, for plain and for sharded parameters."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


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
