"""Finished runs of each kind at tiny size, without training: what `publish` reads."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import yaml

from sdxs_lightning.callbacks.run_folder import ORIGIN, origin
from sdxs_lightning.export import export_pipeline
from sdxs_lightning.families.sd import StableDiffusion
from sdxs_lightning.families.sdxl import StableDiffusionXL
from sdxs_lightning.networks.controlnet import controlnet_from_unet, save_controlnet
from sdxs_lightning.networks.lora import LoRA, add_lora
from sdxs_lightning.networks.lora_files import live_adapters, write_lora
from sdxs_lightning.publishing.runs import Kind, Run, read_run
from sdxs_lightning.publishing.scores import HASH_KEYS, PARTNER_KEYS, hash_of_export, hash_of_partner
from tests.helpers.tiny_distillation import family_of
from tests.helpers.tiny_releases import tiny_decoder
from tests.networks.test_lora import move

PROMPTS = ("a red circle", "a small blue square on gray")


def finished_run(folder: Path, kind: Kind, base: Path, student: Path | None = None) -> Path:
    """A run that exported something of this kind.

    Args:
        folder: of the run, made.
        kind: what it exported.
        base: folder of a tiny base.
        student: an exported pipeline, for a LoRA or ControlNet; without one they are the base's.
    """
    folder.mkdir(parents=True)
    family = family_of(base)
    _EXPORTS[kind](folder / kind, family)
    classes = {"pipeline": "OneStepDistillation", "lora": "StyleDistillation" if student else "DenoisingLoRA"}
    arguments: dict[str, Any] = {
        "family": {
            "class_path": f"sdxs_lightning.families.{type(family).__name__}",
            "init_args": {"base": str(base)},
        },
    }
    if student is not None or kind == "pipeline":
        weights = None if student is None else str(student)
        arguments["student"] = {"class_path": "S", "init_args": {"weights": weights}}
    if kind == "lora" and student is not None:
        arguments["style"] = {"path": "styles/ink.safetensors", "scale": 1.0}
    config = {
        "model": {"class_path": f"stages.{classes.get(kind, 'Other')}", "init_args": arguments},
        "data": {"class_path": "data.shards.ShardDataModule", "init_args": {"shards": "datasets/things"}},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / ORIGIN).write_text(json.dumps(origin()))
    write_scores(folder)
    return folder


def write_scores(folder: Path, **changes: Any) -> None:
    """A score file in the layout of `python -m evaluation.evaluate`."""
    run = read_run(folder)
    settings = {"network": "inception", "samples": 40, "resize": "clean", "conditioning_scale": 0.8}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    fid = {"value": 31.25, "samples": 40, "low": 29.5, "high": 33.0, "hash": digest, "settings": settings}
    toy = {"fingerprint": "b2c1b46eb900", "conditioning_scale": 0.8}
    clip = {"value": 0.75, "samples": 40, "low": 0.5, "high": 1.0, "hash": "b2c1b46eb900", "settings": toy}
    content = {
        HASH_KEYS[run.kind]: hash_of_export(run),
        **measured_with(run),
        "fid": 31.25,
        "protocol": {"name": "clean"},
        "metrics": {"fid": fid, "clip_score": clip},
    }
    (folder / "scores.json").write_text(json.dumps(content | changes))


def measured_with(run: Run) -> dict[str, Any]:
    """Entries of a score file about the sampler and the pipeline of a LoRA, ControlNet or decoder."""
    if run.kind == "decoder":
        return {PARTNER_KEYS[run.kind]: hash_of_partner(run, Path(run.partner))}
    found = {"nfe": 4, "guidance_scale": 3.0} if run.for_base else {"nfe": 1, "guidance_scale": 1.0}
    if run.kind == "lora":
        found["lora_scale"] = 0.75
    partner = (
        {} if run.kind == "pipeline" else {PARTNER_KEYS[run.kind]: hash_of_partner(run, Path(run.partner))}
    )
    return found | partner


def _pipeline(folder: Path, family: StableDiffusion | StableDiffusionXL) -> None:
    export_pipeline(family.load_unet(), family, folder, dtype=torch.float32)


def _lora(folder: Path, family: StableDiffusion | StableDiffusionXL) -> None:
    unet = add_lora(family.load_unet(), LoRA(rank=2))
    move(unet, 0.3)
    folder.mkdir()
    write_lora(folder, live_adapters(unet.state_dict(), None))


def _controlnet(folder: Path, family: StableDiffusion | StableDiffusionXL) -> None:
    controlnet = controlnet_from_unet(family.load_unet(), stem_widths=(8, 16))
    torch.nn.init.normal_(controlnet.controlnet_mid_block.weight)
    save_controlnet(controlnet, folder, torch.float32)


def _decoder(folder: Path, family: StableDiffusion | StableDiffusionXL) -> None:
    tiny_decoder().save_pretrained(folder)


_EXPORTS = {"pipeline": _pipeline, "lora": _lora, "controlnet": _controlnet, "decoder": _decoder}
