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
        self.rounded_fingerprint = fingerprint(module, torch.bfloat16)
        """The same of the weights rounded to bfloat16, equal for a file that is loaded in float32 or in bfloat16."""

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


def fingerprint(module: nn.Module, rounded_to: torch.dtype | None = None) -> str | None:
    """Hashes all bits of the weights, as "dtype:digest"; None for a module on the meta device or without weights.

    Adapters are excluded, since they are trained.

    Args:
        module: any network.
        rounded_to: dtype that each weight is rounded to first; None hashes them as they are.
    """
    weights = {name: one for name, one in module.named_parameters() if "lora_" not in name}
    if not weights or any(one.is_meta for one in weights.values()):
        return None
    digest = hashlib.sha256()
    for name, parameter in sorted(weights.items()):
        weight = parameter.detach().to(dtype=rounded_to)
        # hash_tensor XORs the bits in one pass without a copy. Equal values cancel, so the first values are hashed too.
        bits = torch.hash_tensor(weight).view(torch.int64).item()
        digest.update(f"{name} {tuple(weight.shape)} {bits}".encode())
        digest.update(weight.flatten()[:64].float().cpu().numpy().tobytes())
    dtype = str(rounded_to or next(iter(weights.values())).dtype).removeprefix("torch.")
    return f"{dtype}:{digest.hexdigest()[:16]}"
