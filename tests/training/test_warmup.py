"""The warm-up on pairs of the target sampler."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from sdxs_lightning.modules.curriculum import Curriculum
from tests.training.tiny_distillation import (
    WARMUP,
    distillation,
    fit,
)

Base = Callable[[str], Path]


def test_warmup_is_deterministic_and_lowers_its_loss(base: Base, shards: Path) -> None:
    losses: list[list[float]] = []
    for _ in range(2):
        module = distillation(
            base("sd-v_prediction"),
            curriculum=Curriculum(max_student_updates=12, warmup_updates=12),
            **WARMUP,
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
