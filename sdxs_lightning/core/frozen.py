"""A wrapper that hides a frozen network from Lightning."""

from __future__ import annotations

import hashlib
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)
Dtype = Literal["float32", "bfloat16", "float16"]
"""What a frozen network is cast to, as configurations name it."""


class Frozen(Generic[M]):
    """Wraps a module in eval mode without parameter gradients; is not an `nn.Module` itself.

    A module that is an attribute of a LightningModule is registered: its weights go into checkpoints, `parameters()`, DDP's
    buckets and averaged copies, where a teacher does not belong. The owner of a `Frozen` moves it to the device, since
    Lightning does not.

    Gradients with respect to *inputs* still flow, so a loss may use frozen features; call it under `torch.no_grad()`
    otherwise.
    """

    def __init__(self, module: M) -> None:
        self.module: M = module.eval().requires_grad_(False)
        self.fingerprint = fingerprint(module)
        """Fingerprint of the weights as loaded, before casting or sharding."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Frozen[M]:
        """Moves the module in place; None keeps the device or dtype."""
        # nn.Module's own to(): that of diffusers warns about every cast.
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
    """Hashes all bits of the weights, as "dtype:digest"; None for a module on the meta device or without weights.

    Adapters are excluded, since they are trained.
    """
    weights = {name: one for name, one in module.named_parameters() if "lora_" not in name}
    if not weights or any(one.is_meta for one in weights.values()):
        return None
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        # hash_tensor XORs the bits in one pass without a copy. Equal values cancel, so the first values are hashed too.
        bits = torch.hash_tensor(weight.detach()).view(torch.int64).item()
        digest.update(f"{name} {tuple(weight.shape)} {bits}".encode())
        digest.update(weight.detach().flatten()[:64].float().cpu().numpy().tobytes())
    dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    return f"{dtype}:{digest.hexdigest()[:16]}"
