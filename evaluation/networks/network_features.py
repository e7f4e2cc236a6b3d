"""Interface and helpers of frozen float32 feature networks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Disable gradients, autocast and TF32, so that results are comparable between machines.

    Under Lightning's bf16 autocast, an Inception FID was 3 % too high.
    """
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        if device.type != "cuda":
            yield
            return
        before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before[0])
            torch.backends.cudnn.allow_tf32 = before[1]


class Features(Protocol):
    """A network that computes image features for distances between sets of images.

    Always in eval mode, without gradients, in float32 even under autocast. Not an nn.Module, so its weights enter no
    checkpoint, optimizer or DDP bucket. It moves to the device of the images.
    """

    name: str
    """Short name, for results."""
    dimensions: int
    """Feature dimension d."""

    def __call__(self, images_uint8: Tensor) -> Tensor:
        """(B,3,H,W) uint8 images to (B, d) float32 features."""

    def identity(self) -> dict[str, str]:
        """Hash of the weights, resize, normalisation: everything the features depend on. Enters the protocol's hash."""


def check_uint8(images_uint8: Tensor) -> None:
    """Check that images are uint8.

    Raises:
        TypeError: for another dtype.
    """
    if images_uint8.dtype != torch.uint8:
        raise TypeError(f"images must be uint8 in 0..255, got {images_uint8.dtype}; use latents.to_uint8")


def hash_state(module: nn.Module) -> str:
    """16-digit hex hash of the names and values of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def hash_settings(settings: Any) -> str:
    """16-digit hex hash of JSON-serialisable settings; other values are hashed as strings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]
