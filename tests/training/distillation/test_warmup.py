"""The warm-up on pairs of the target sampler."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from sdxs_lightning.stages.distillation.update_schedule import UpdateSchedule
from tests.helpers.tiny_distillation import (
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
            update_schedule=UpdateSchedule(max_student_updates=12, warmup_updates=12),
            **WARMUP,
        )
        seen: list[float] = []
        trainer_metrics = _Metrics("student/regression", seen)
        fit(module, shards, batches=12, batch_size=8, callbacks=[trainer_metrics])
        losses.append(seen)
    assert losses[0] == losses[1]
    assert sum(losses[0][-3:]) < 0.9 * sum(losses[0][:3])


def test_pairs_are_given_back_when_their_time_is_over(base: Base, shards: Path) -> None:
    module = distillation(
        base("sd-epsilon"), update_schedule=UpdateSchedule(max_student_updates=9, warmup_updates=2), **WARMUP
    )
    held: list[bool] = []

    class Look(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            assert module.pairs is not None
            held.append(module.pairs.in_memory)

    fit(module, shards, batches=3, callbacks=[Look()])
    assert held == [True, False, False]


class _Metrics(Callback):
    def __init__(self, name: str, into: list[float]) -> None:
        self.name, self.into = name, into

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.into.append(float(trainer.callback_metrics[self.name]))
