"""What a set of latents is made of."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

SETTINGS_FILE = "latents.json"
NAMES_ONLY = ("source", "model", "config", "vae")
Store = Literal["mean", "mean+logvar"]
StoredDtype = Literal["float16", "float32"]
VaeDtype = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class LatentSettings:
    """Everything that the shards depend on, but for the machine."""

    source: str
    """Shards of images, as named on the command line."""
    model: str
    """Base: diffusers folder, hub id or single file."""
    config: str | None
    """Configs of a single file."""
    vae: str | None
    """Another VAE in the base's place."""
    source_fingerprint: str
    """Of the shards' index."""
    vae_fingerprint: str
    """Of the VAE's config and weights."""
    shards: int
    """Number of shards, as in the source."""
    sizes: list[list[int]]
    """Height and width in pixels; a picture goes to the one of the nearest aspect."""
    dtype: StoredDtype
    """Of the stored numbers."""
    store: Store
    """Mean of the VAE's posterior, or also the logarithm of its variance."""
    vae_dtype: VaeDtype
    """Of the VAE's weights and computations."""
    batch_size: int
    """Pictures at once: another number may round otherwise in the last bits."""
    format: int = 1
    """Raised when the same settings would give other shards."""


def fingerprint(folder: Path) -> str:
    """Of the config and weights of a network; reads them once."""
    found = hashlib.sha256()
    for file in sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors")):
        found.update(file.name.encode())
        with file.open("rb") as stream:
            found.update(hashlib.file_digest(stream, "sha256").digest())
    return found.hexdigest()[:16]
