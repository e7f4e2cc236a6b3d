"""A holder that hides a frozen network from Lightning."""

from __future__ import annotations

import hashlib
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
        self.fingerprint = fingerprint(module)
        """Of its weights as they were loaded, before they are cast or sharded."""

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


def fingerprint(module: nn.Module) -> str | None:
    """Identifies weights as "dtype:digest", to which every bit counts; None for a module without data, as in a memory plan.

    Adapters are left out: they learn on weights that are frozen.
    """
    weights = {name: one for name, one in module.named_parameters() if "lora_" not in name}
    if not weights or any(one.is_meta for one in weights.values()):
        return None
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        # An exclusive or of the bits: one pass without a copy. Equal values cancel in it, so the first ones are added.
        bits = torch.hash_tensor(weight.detach()).view(torch.int64).item()
        digest.update(f"{name} {tuple(weight.shape)} {bits}".encode())
        digest.update(weight.detach().flatten()[:64].float().cpu().numpy().tobytes())
    dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    return f"{dtype}:{digest.hexdigest()[:16]}"
