"""What a set of pairs was made of, kept beside its shards, so that a set is never gone on with in another way."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from data.prepare.common import settings_file
from sdxs_lightning.core.timesteps import Spacing
from sdxs_lightning.families import Family
from sdxs_lightning.families.sources import resolve_unet

SETTINGS_FILE = "pairs.json"
FORMAT = 1
_NAMES_ONLY = ("model", "unet", "config", "captions")
"""How things were named on the command line: a moved folder is the same set as long as the fingerprints agree."""


@dataclass(frozen=True, kw_only=True)
class PairSettings:
    """Everything that the stored latents depend on, but for the machine."""

    model: str
    """Diffusers folder, hub id or single file."""
    unet: str | None
    """Another U-Net in the model's place."""
    config: str | None
    """Configs of a single file."""
    captions: str
    """Text file, shards or "toy:SPLIT"."""
    model_fingerprint: str
    """Of U-Net, text encoders, tokenizers and scheduler config."""
    captions_fingerprint: str
    """Of all prompts."""
    pipeline_class: str
    """Of the model."""
    resolution: int
    """Pixels of a side: the model's own."""
    count: int
    """PairSettings of the whole set."""
    samples_per_shard: int
    """PairSettings of a shard; the last may hold fewer."""
    steps: int
    """Of the target sampler."""
    guidance: float
    """Of the target sampler; 1 means none."""
    scheduler: str | None
    """Class name in diffusers; None is DDIM."""
    spacing: Spacing
    """Of the timesteps."""
    seed: int
    """Of the noise."""
    dtype: str
    """Of U-Net and text encoders."""
    format: int = FORMAT
    """Raised when the same settings would give other pairs."""

    @property
    def shards(self) -> int:
        """Number of shards of the whole set."""
        return -(-self.count // self.samples_per_shard)

    def indices(self, shard: int) -> range:
        """The pairs of a shard."""
        return range(shard * self.samples_per_shard, min((shard + 1) * self.samples_per_shard, self.count))


def begin(folder: Path, settings: PairSettings) -> None:
    """As `settings_file.begin`."""
    settings_file.begin(folder, SETTINGS_FILE, settings, _NAMES_ONLY)


def fingerprint(family: Family, unet: str | None) -> str:
    """Of every file that decides which latents are sampled; reads them once.

    Args:
        family: the model.
        unet: as `PairSettings.unet`.
    """
    parts = sorted(
        path for path in family.folder.iterdir() if path.name.startswith(("text_encoder", "tokenizer"))
    )
    parts += [family.folder / "scheduler", family.folder / "unet" if unet is None else resolve_unet(unet)]
    digest = hashlib.sha256()
    for folder in parts:
        for file in sorted(
            path for path in folder.rglob("*") if path.suffix in (".json", ".txt", ".safetensors")
        ):
            digest.update(file.name.encode())
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]
