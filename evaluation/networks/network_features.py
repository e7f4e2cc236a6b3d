"""Frozen feature networks in float32: their common interface, and what they share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No gradients, no autocast, no TF32: what a number that is compared between machines is measured in.

    Under the bf16 autocast that Lightning wraps around steps, an Inception FID came out 3 % too high.
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
    """A network that turns images into the vectors that distances between sets of images are measured in.

    Always in eval mode, without gradients, in float32 also under autocast, and not an nn.Module: no checkpoint, optimizer or
    DDP bucket sees its weights. It follows the images to their device.
    """

    name: str
    """Short; stands in results."""
    dimensions: int
    """d."""

    def __call__(self, images_uint8: Tensor) -> Tensor:
        """(B,3,H,W) uint8 images to (B, d) float32 features."""

    def identity(self) -> dict[str, str]:
        """What the features depend on: hash of the weights, resize, normalisation. Enters the protocol's hash."""


@dataclass(frozen=True)
class CentreCrop:
    """Features of the middle of each image at its full resolution: what patch FID is measured in.

    Source: SDXL-Lightning, arXiv:2402.13929; DMD2's evaluator crops both sets to the 299 pixels of Inception.
    """

    features: Features
    """Of the crop."""
    px: int = 299
    """Side of the crop."""

    @property
    def name(self) -> str:
        """Of the network, and the crop."""
        return f"{self.features.name}-centre{self.px}"

    @property
    def dimensions(self) -> int:
        """As of the network."""
        return self.features.dimensions

    def __call__(self, images_uint8: Tensor) -> Tensor:
        """See Features.

        Raises:
            ValueError: for images smaller than the crop (other tools measure those uncropped, without a word).
        """
        height, width = images_uint8.shape[-2:]
        if min(height, width) < self.px:
            raise ValueError(
                f"patch FID crops {self.px} x {self.px} pixels out of each image, but these have {height} x {width}; "
                "use images at full resolution, or a protocol without patch FID"
            )
        top, left = (round((side - self.px) / 2) for side in (height, width))
        return self.features(images_uint8[..., top : top + self.px, left : left + self.px])

    def identity(self) -> dict[str, str]:
        return self.features.identity() | {"crop": f"centre {self.px}"}


def check_uint8(images_uint8: Tensor) -> None:
    """Refuse float images.

    Raises:
        TypeError: for another dtype.
    """
    if images_uint8.dtype != torch.uint8:
        raise TypeError(f"images must be uint8 in 0..255, got {images_uint8.dtype}; use latents.to_uint8")


def hash_state(module: nn.Module) -> str:
    """16 hex digits over the names and values of all parameters and buffers, wherever they were loaded from."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def hash_settings(settings: Any) -> str:
    """16 hex digits over settings that JSON can hold; other values count as their text."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]
