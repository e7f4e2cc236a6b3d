"""Choosing the family for a base that only a command line names; configs name theirs by class_path."""

from __future__ import annotations

from pathlib import Path

from sdxs_lightning.families import Family
from sdxs_lightning.families.folders import read_json
from sdxs_lightning.families.sd import StableDiffusion
from sdxs_lightning.families.sdxl import StableDiffusionXL


def detect_family(base: str) -> Family:
    """The family whose pipeline `model_index.json` names; SD's where there is none, so that its own message is seen.

    Args:
        base: diffusers folder.

    Raises:
        FileNotFoundError: as the family's constructor.
        ValueError: as the family's constructor.
    """
    index = Path(base) / "model_index.json"
    named = read_json(index).get("_class_name") if index.is_file() else None
    return StableDiffusionXL(base) if named == "StableDiffusionXLPipeline" else StableDiffusion(base)
