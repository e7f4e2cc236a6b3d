"""A holder that hides a frozen network from Lightning."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


class Frozen(Generic[M]):
    """Holds a module in eval mode and without gradients, and is not an `nn.Module` itself.

    An attribute of a LightningModule that is a module is registered: its weights go into every checkpoint, into
    `parameters()`, into DDP's buckets and into an averaged copy. A teacher belongs in none of these. The owner of a
    `Frozen` moves it to its device, because Lightning does not.

    Gradients with respect to *inputs* still flow, so frozen features can serve a loss; wrap the call in
    `torch.no_grad()` where that is not wanted.
    """

    def __init__(self, module: M) -> None:
        self.module: M = module.eval().requires_grad_(False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the module."""
        return self.module(*args, **kwargs)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Frozen[M]:
        """Moves the module in place; None leaves device or dtype as it is."""
        # Of nn.Module itself: the override of diffusers warns about every cast, also where nothing is at stake.
        nn.Module.to(self.module, device=device, dtype=dtype)
        return self

    @property
    def device(self) -> torch.device:
        """Device of the first parameter."""
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the first parameter."""
        return next(self.module.parameters()).dtype
