"""Helpers of the memory plan's tests."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sdxs_lightning.memory_plan.hardware import Hardware, read_hardware
from sdxs_lightning.stages.teacher import DenoisingTraining
from sdxs_lightning.training.lr_schedules import TrapezoidLR
from tests.helpers.tiny_distillation import family_of

ADAMW = partial(torch.optim.AdamW, lr=1e-3, fused=True)
PLANNED: dict[str, Any] = {
    "optimizer": ADAMW,
    "accumulate_grad_batches": 2,
    "real_score_dtype": "bfloat16",
}
"""Settings of the distillation of the fixtures `planner` and `planned`."""
ONE_GPU = {"accelerator": "gpu", "devices": 1, "precision": "bf16-mixed"}
ONE_CPU = {"accelerator": "cpu", "devices": 1, "precision": "32-true"}


def hardware(gpu_gib: float = 80.0, **trainer: Any) -> Hardware:
    return read_hardware(ONE_GPU | trainer, gpu_gib)


def without_weights(base: Path, folder: Path) -> Path:
    """A copy of a base's JSON files."""
    copy = folder / base.name
    if not copy.exists():
        shutil.copytree(base, copy, ignore=shutil.ignore_patterns("*.safetensors"))
    return copy


def teacher(base: Path, **settings: Any) -> DenoisingTraining:
    schedule = partial(TrapezoidLR, total_updates=10, rise_updates=1, fall_updates=1)
    return DenoisingTraining(family_of(base), settings.pop("optimizer", ADAMW), schedule, "", **settings)
