"""What a set of pairs is made of."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

from sdxs_lightning.core.model_hash import files_below
from sdxs_lightning.core.timesteps import Spacing
from sdxs_lightning.families import Family
from sdxs_lightning.families.sources import resolve_unet

SETTINGS_FILE = "pairs.json"
NAMES_ONLY = ("model", "unet", "config", "captions")
"""Settings that name an input: a moved folder is the same input as long as the fingerprints agree."""


@dataclass(frozen=True, kw_only=True)
class PairSet:
    """Everything that the stored latents depend on, but for the machine; pairs.json keeps it."""

    model: str
    """Diffusers folder, hub id or single file."""
    unet: str | None
    """U-Net instead of the model's."""
    config: str | None
    """Configs of a single file."""
    captions: str
    """Text file, shards or "toy:SPLIT"."""
    model_fingerprint: str
    """Fingerprint of U-Net, text encoders, tokenizers and scheduler config."""
    captions_fingerprint: str
    """Fingerprint of all prompts."""
    pipeline_class: str
    """Pipeline class of the model."""
    resolution: int
    """Pixels of a side: the model's own."""
    count: int
    """Pairs of the complete set."""
    samples_per_shard: int
    """Pairs of a shard; the last may hold fewer."""
    steps: int
    """Steps of the target sampler."""
    guidance: float
    """Guidance scale of the target sampler; 1 means none. The name is that of the first sets that were stored."""
    scheduler: str | None
    """Class name in diffusers; None is DDIM."""
    spacing: Spacing
    """Spacing of the timesteps."""
    seed: int
    """Seed of the noise."""
    dtype: str
    """Dtype of U-Net and text encoders."""
    format: int = 1
    """Raised when the same settings would give other pairs."""

    @property
    def settings(self) -> dict[str, Any]:
        """As pairs.json keeps them."""
        return asdict(self)

    @property
    def shards(self) -> int:
        """Number of shards of the complete set."""
        return -(-self.count // self.samples_per_shard)

    def indices(self, shard: int) -> range:
        """The pairs of a shard."""
        return range(shard * self.samples_per_shard, min((shard + 1) * self.samples_per_shard, self.count))


def model_fingerprint(family: Family, unet: str | None) -> str:
    """Hash of every file that decides which latents are sampled; reads them once.

    Args:
        family: the model.
        unet: as `PairSet.unet`.
    """
    folders = sorted(
        path for path in family.folder.iterdir() if path.name.startswith(("text_encoder", "tokenizer"))
    )
    folders += [
        family.folder / "scheduler",
        family.folder / "unet" if unet is None else resolve_unet(unet, "--unet"),
    ]
    digest = hashlib.sha256()
    for folder in folders:
        for file in sorted(
            path for path in files_below(folder) if path.suffix in (".json", ".txt", ".safetensors")
        ):
            digest.update(file.name.encode())
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]
