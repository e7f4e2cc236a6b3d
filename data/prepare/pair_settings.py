"""What a set of pairs was made of, kept beside its shards, so that a set is never gone on with in another way."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from sdxs_lightning.errors import UserError
from sdxs_lightning.families import Family
from sdxs_lightning.families.sources import resolve_unet
from sdxs_lightning.timesteps import Spacing

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
    """Pairs of the whole set."""
    samples_per_shard: int
    """Pairs of a shard; the last may hold fewer."""
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
    """Writes the settings into a new folder, or compares them with those that a set was begun with.

    Raises:
        UserError: for a set with other settings, or shards without any.
    """
    file = folder / SETTINGS_FILE
    if not file.is_file():
        if any(folder.glob("*.tar")):
            raise UserError(
                f"--out '{folder}' holds shards and no {SETTINGS_FILE}, so they are not of this command; give another "
                "folder."
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, asdict(settings))
        return
    try:
        before: dict[str, Any] = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(
            f"'{file}' cannot be read ({error}); remove the folder or give another --out."
        ) from error
    now = asdict(settings)
    for name in (entry.name for entry in fields(PairSettings) if entry.name not in _NAMES_ONLY):
        if before.get(name) != now[name]:
            raise UserError(
                f"--out '{folder}' was begun with {name} {before.get(name)!r} and this command says {now[name]!r}: "
                "give what it was begun with to go on, or another folder."
            )


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file that appears whole or not at all."""
    with tempfile.NamedTemporaryFile(
        "w", dir=file.parent, prefix=f".{file.name}-", delete=False, encoding="utf-8"
    ) as stream:
        json.dump(content, stream, indent=2)
        stream.write("\n")
    os.chmod(stream.name, 0o644)
    os.replace(stream.name, file)


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
