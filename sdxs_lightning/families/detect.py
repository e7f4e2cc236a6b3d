"""Detects the family of a base given on a command line; configs name theirs by class_path."""

from __future__ import annotations

from pathlib import Path

from sdxs_lightning.core.hub_ids import is_hub_id
from sdxs_lightning.families import Family, hub
from sdxs_lightning.families.folders import read_json
from sdxs_lightning.families.sd import StableDiffusion
from sdxs_lightning.families.sdxl import StableDiffusionXL

FAMILIES: dict[str, type[StableDiffusion | StableDiffusionXL]] = {
    family.layout.pipeline_class: family for family in (StableDiffusion, StableDiffusionXL)
}
"""Families by the `_class_name` in a base's `model_index.json`."""


def detect_family(base: str, config: str | None = None) -> Family:
    """Loads a base with the family that its `model_index.json` names.

    Args:
        base: diffusers folder, hub id, or single .safetensors file.
        config: for a single file, the folder or hub id of its configs, which determine the family.

    Raises:
        FileNotFoundError: from the family's constructor.
        ValueError: for an unsupported pipeline, or from the family's constructor.
    """
    source = base if config is None else config
    pipeline_class = _pipeline_class(source)
    # Without a readable model_index.json any constructor raises the proper error.
    family = StableDiffusion if pipeline_class is None else FAMILIES.get(pipeline_class)
    if family is None:
        raise ValueError(f"'{source}' holds a {pipeline_class}, accepted are {', '.join(FAMILIES)}.")
    return family(base, config=config)


def _pipeline_class(source: str) -> str | None:
    folder = Path(source)
    if not folder.exists() and is_hub_id(source):
        try:
            folder = hub.fetch(source, "model_index.json", (), weights=False)
        except (FileNotFoundError, ValueError):
            return None
    index = folder / "model_index.json"
    return read_json(index).get("_class_name") if index.is_file() else None
