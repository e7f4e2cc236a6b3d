"""A wrapper that hides a frozen network from Lightning."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)
Dtype = Literal["float32", "bfloat16", "float16"]
"""What a frozen network is cast to, as configurations name it."""
FINGERPRINT_VERSION = 2


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
    """Hashes all weights but adapters, which are trained; None for a module on the meta device or without weights.

    Args:
        module: any network.
        rounded_to: dtype that each weight is rounded to first; None hashes them as they are.

    Returns:
        "dtype:version:digest".
    """
    return fingerprint_of(
        {name: one for name, one in module.named_parameters() if "lora_" not in name}, rounded_to
    )


def fingerprint_of(weights: Mapping[str, Tensor], rounded_to: torch.dtype | None = None) -> str | None:
    """The fingerprint of weights by name; as `fingerprint`."""
    if not weights or any(one.is_meta for one in weights.values()):
        return None
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        values = weight.detach().to("cpu", rounded_to).contiguous().flatten()
        # A cryptographic hash of 2.6 billion weights takes as long as reading them on processors without SHA instructions.
        checksum = zlib.crc32(values.view(torch.uint8).numpy().data)
        digest.update(f"{name} {tuple(weight.shape)} {checksum}".encode())
    dtype = str(rounded_to or next(iter(weights.values())).dtype).removeprefix("torch.")
    return f"{dtype}:{FINGERPRINT_VERSION}:{digest.hexdigest()[:16]}"


def is_comparable(fingerprint: str) -> bool:
    """Whether a checkpoint's fingerprint is computed as those of today."""
    return f":{FINGERPRINT_VERSION}:" in fingerprint
