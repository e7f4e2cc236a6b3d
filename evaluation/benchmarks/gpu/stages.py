"""Section `stages`: steps of the stages `miniaturise` and `decoder` at full size."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from evaluation.benchmarks.gpu.random_base import Kind, RandomBase
from evaluation.benchmarks.gpu.section import SectionRun, seconds_of
from sdxs_lightning.families import Family
from sdxs_lightning.networks.tiny_decoder import TinyDecoder
from sdxs_lightning.objectives.knowledge_distillation import FeatureDistillation
from sdxs_lightning.stages.decoder import DecoderDistillation
from sdxs_lightning.stages.prune_distill import PrunedUNetDistillation
from sdxs_lightning.surgery.topology import Stage, Topology

STEPS = 20
STUDENTS: dict[Kind, str] = {"sd15": "sdxs-512", "sdxl": "sdxs-1024"}
BATCH_SIZES: dict[Kind, int] = {"sd15": 16, "sdxl": 4}


def run(run: SectionRun) -> None:
    """Knowledge distillation of SDXS-512 and SDXS-1024, and the tiny decoder on latents of SD-1.5."""
    kinds: tuple[Kind, ...] = ("sd15", "sdxl")
    with tempfile.TemporaryDirectory() as folder:
        for kind in kinds:
            base = RandomBase.of(kind, Path(folder) / kind, run.device, run.tiny)
            size = 2 if run.tiny else BATCH_SIZES[kind]
            labels = {"base": kind, "batch_size": size}
            run.attempt(
                partial(_steps, run, partial(_pruned, run, base, kind), base, size),
                stage="miniaturise",
                **labels,
            )
            if kind == "sd15":
                run.attempt(
                    partial(_steps, run, partial(_decoder, base), base, size), stage="decoder", **labels
                )


def _pruned(run: SectionRun, base: RandomBase, kind: Kind) -> PrunedUNetDistillation:
    # The presets' Transformers are deeper than the tiny base's.
    tiny = Topology(stages=(Stage(), Stage(), Stage()), mid_block="resnet")
    return PrunedUNetDistillation(
        cast(Family, base),
        tiny if run.tiny else STUDENTS[kind],
        partial(torch.optim.AdamW, lr=1e-6, fused=True),
        feature_distillation=FeatureDistillation(),
        real_score_dtype="bfloat16",
    )


def _decoder(base: RandomBase) -> DecoderDistillation:
    adamw = partial(torch.optim.AdamW, lr=1e-6, fused=True)
    return DecoderDistillation(
        cast(Family, base), TinyDecoder(adamw), max_student_updates=10**6, sampler=None
    )


def _steps(run: SectionRun, make_stage: Callable[[], Any], base: RandomBase, size: int) -> dict[str, Any]:
    """Milliseconds of a step and peak memory, through the step that the memory plan counts."""
    stage = make_stage()
    stage.configure_model()
    stage.to(run.device)
    stage.on_fit_start()
    stage.manual_backward = lambda loss: loss.backward()
    trained = [one for one in stage.plan_networks() if one.role == "trained"]
    optimizers = {one.name: one.optimizer(list(one.module.parameters())) for one in trained}
    batch = base.batch(size)
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def step() -> None:
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.device.type == "cuda"):
            for phase in stage.plan_step(batch):
                for name in phase.updates:
                    optimizers[name].step()
                    optimizers[name].zero_grad(set_to_none=True)

    repeats, warmups = (1, 0) if run.tiny else (STEPS, 2)
    seconds = seconds_of(step, run.device, repeats, warmups)
    found = {"step_ms": 1000 * seconds, "images_per_second": size / seconds}
    if run.device.type == "cuda":
        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return found
