"""Choosing the family for a base that only a command line names; configs name theirs by class_path."""

from __future__ import annotations

from pathlib import Path

from sdxs_lightning.families import Family, hub
from sdxs_lightning.families.folders import read_json
from sdxs_lightning.families.sd import StableDiffusion
from sdxs_lightning.families.sdxl import StableDiffusionXL


def detect_family(base: str, config: str | None = None) -> Family:
    """The family whose pipeline `model_index.json` names; SD's where there is none, so that its own message is seen.

    Args:
        base: diffusers folder, hub id, or single .safetensors file.
        config: for a single file, the folder or hub id of its configs, which say what it is.

    Raises:
        FileNotFoundError: as the family's constructor.
        ValueError: as the family's constructor.
    """
    named = _pipeline_class(base if config is None else config)
    family = StableDiffusionXL if named == "StableDiffusionXLPipeline" else StableDiffusion
    return family(base, config=config)


def _pipeline_class(source: str) -> str | None:
    folder = Path(source)
    if not folder.exists() and hub.is_hub_id(source):
        try:
            folder = hub.fetch(source, "model_index.json", (), weights=False)
        except (FileNotFoundError, ValueError):
            return None
    index = folder / "model_index.json"
    return read_json(index).get("_class_name") if index.is_file() else None
