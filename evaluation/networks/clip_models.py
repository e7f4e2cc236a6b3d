"""Presets of the CLIP models behind published scores, with the caption and image preprocessing of their authors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from evaluation.networks.clip_loading import load_folder, load_open_clip, load_transformers
from evaluation.networks.frozen_clip import PLAIN, ClipRule, FrozenClip


@dataclass(frozen=True)
class ClipPreset:
    """A CLIP model with its preprocessing of captions and images."""

    model: str
    """Name in open_clip, or a hub id if `tag` is empty."""
    tag: str = ""
    """Tag of the weights in open_clip."""
    rule: ClipRule = PLAIN
    """Preprocessing of captions and images."""
    processor: str | None = None
    """Hub id of tokenizer and preprocessing, if not the model's."""


DMD2_RULE = ClipRule(prefix="A photo depicts ", square_px=256)
"""Source: tianweiy/DMD2, main/coco_eval/coco_evaluator.py."""

CLIP_PRESETS = {
    "vit-g-14-s12b": ClipPreset("ViT-g-14", "laion2b_s12b_b42k"),
    "vit-g-14-s34b": ClipPreset("ViT-g-14", "laion2b_s34b_b88k"),
    "vit-l-14": ClipPreset("ViT-L-14", "openai"),
    "vit-l-14-336": ClipPreset("ViT-L-14-336", "openai"),
    "vit-b-32": ClipPreset("ViT-B-32", "openai"),
    "dmd2": ClipPreset("ViT-g-14", "laion2b_s12b_b42k", DMD2_RULE),
    "bk-sdm": ClipPreset("ViT-g-14", "laion2b_s34b_b88k"),
    "pickscore": ClipPreset("yuvalkirstain/PickScore_v1", processor="laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
    "hpsv2": ClipPreset("ViT-H-14", "laion2b_s32b_b79k"),
}
"""`hpsv2` needs its weight file (HPS_v2_compressed.pt or HPS_v2.1_compressed.pt); the tag names the weights it was trained
from. `bk-sdm` reads the 256 px JPEG of its protocol; source: Nota-NetsPresso/BK-SDM, src/eval_clip_score.py."""


def load_clip(name: str | Path, weights: str | Path | None = None) -> FrozenClip:
    """Load a preset by name, or a local folder in open_clip's or transformers' layout.

    Args:
        name: key of CLIP_PRESETS, or a folder, which gets no prefix or crop.
        weights: for a preset, a checkpoint file or a folder in transformers' layout instead of the hub's weights.

    Raises:
        ValueError: for an unknown name, or for HPSv2 without its weights.
        FileNotFoundError: if the weights are missing.
    """
    if Path(name).is_dir():
        return FrozenClip(load_folder(name))
    if str(name) not in CLIP_PRESETS:
        raise ValueError(
            f"no CLIP named {str(name)!r}: neither a folder nor one of {', '.join(CLIP_PRESETS)} (evaluation/clip_models.py)"
        )
    preset = CLIP_PRESETS[str(name)]
    if name == "hpsv2" and weights is None:
        raise ValueError(
            "hpsv2 needs the file of its weights, HPS_v2_compressed.pt or HPS_v2.1_compressed.pt (huggingface.co/xswu/HPSv2)"
        )
    if not preset.tag:
        loaded = load_transformers(weights or preset.model, None if weights else preset.processor)
    elif weights is not None and Path(weights).is_dir():
        loaded = load_folder(weights)
    else:
        loaded = load_open_clip(preset.model, preset.tag, weights)
    return FrozenClip(loaded, preset.rule)
