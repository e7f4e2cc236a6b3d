"""The warm-up on pairs of the target sampler."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from sdxs_lightning.batch import Conditioning
from sdxs_lightning.modules.curriculum import Curriculum
from sdxs_lightning.modules.regression_warmup import RegressionWarmup, make_pairs
from sdxs_lightning.teacher.target_sampler import TargetSampler
from tests.tiny import tiny_batch
from tests.training.tiny_distillation import (
    WARMUP,
    built,
    distillation,
    fit,
)

Base = Callable[[str], Path]


def test_pairs_are_the_target_samplers_whatever_the_batches(base: Base) -> None:
    module = built(distillation(base("sd-v_prediction")))
    assert module.real_score is not None
    captions = tiny_batch(5).captions
    pairs = [
        make_pairs(
            RegressionWarmup(pairs=7, sampler_steps=3, guidance_scale=2.0, sampler_batch_size=size),
            captions,
            module.family,
            module.real_score.module,
            seed=5,
        )
        for size in (2, 7)
    ]
    torch.testing.assert_close(pairs[0].targets, pairs[1].targets, rtol=1e-4, atol=1e-4)
    noise, conditioning, target = pairs[0].pick(torch.arange(100, 104))
    guided = Conditioning(
        prompt_embeds=conditioning.prompt_embeds,
        negative_prompt_embeds=module.family.encode_prompts([""] * 4).prompt_embeds,
    )
    expected = TargetSampler(module.real_score.module, 3, 2.0)(noise, guided)
    torch.testing.assert_close(target, expected, rtol=1e-4, atol=1e-4)
    assert conditioning.negative_prompt_embeds is None


def test_warmup_is_deterministic_and_lowers_its_loss(base: Base, shards: Path) -> None:
    losses: list[list[float]] = []
    for _ in range(2):
        module = distillation(
            base("sd-v_prediction"),
            curriculum=Curriculum(max_student_updates=12, warmup_updates=12),
            warmup=WARMUP,
        )
        seen: list[float] = []
        trainer_metrics = _Metrics("student/regression", seen)
        fit(module, shards, batches=12, batch_size=8, callbacks=[trainer_metrics])
        losses.append(seen)
    assert losses[0] == losses[1]
    assert sum(losses[0][-3:]) < 0.9 * sum(losses[0][:3])


class _Metrics(Callback):
    def __init__(self, name: str, into: list[float]) -> None:
        self.name, self.into = name, into

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.into.append(float(trainer.callback_metrics[self.name]))
