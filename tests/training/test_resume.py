"""A run that was cut off and resumed is the run that was not, to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from sdxs_lightning.core.batch import TrainingBatch
from sdxs_lightning.networks.discriminator import Discriminator
from sdxs_lightning.networks.fake_score import FakeScore
from sdxs_lightning.networks.student_generator import StudentGenerator
from sdxs_lightning.objectives.regression import Regression
from sdxs_lightning.pairs.target_pairs import PairSettings
from sdxs_lightning.stages.distillation.step import OneStepDistillation
from sdxs_lightning.stages.distillation.update_schedule import UpdateSchedule
from sdxs_lightning.training.lr_schedules import TwoPhaseLR
from tests.helpers.tiny_distillation import batches_of, distillation, fit

Base = Callable[[str], Path]
ITERATIONS = 9


def module_for(base: Path, max_student_updates: int = 99) -> OneStepDistillation:
    adamw = partial(torch.optim.AdamW, lr=1e-3)
    return distillation(
        base,
        student=StudentGenerator(
            adamw, partial(TwoPhaseLR, total_updates=20, first_phase_updates=2, first_phase_factor=3.0)
        ),
        fake_score=FakeScore(adamw),
        discriminator=Discriminator(adamw),
        update_schedule=UpdateSchedule(
            max_student_updates=max_student_updates,
            fake_score_updates_per_student_update=2,
            warmup_updates=2,
            fake_score_only_iterations=1,
        ),
        pairs=PairSettings(count=6, sampler_steps=2, sampler_batch_size=4),
        regression=Regression(),
        accumulate_grad_batches=2,
    )


class Witness(Callback):
    """Writes down which samples came, and saves at one batch."""

    def __init__(self, path: Path | None = None, batch: int = 0) -> None:
        self.path, self.batch = path, batch
        self.seen: list[tuple[tuple[str, ...], tuple[int, ...]]] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: TrainingBatch, *_: Any
    ) -> None:
        self.seen.append((tuple(batch.sample_ids), tuple(batch.positions.tolist())))
        if self.path is not None and batches_of(trainer) == self.batch:
            trainer.save_checkpoint(self.path)


def same(one: Any, two: Any, where: str = "") -> None:
    """Equal to the last bit, through dicts, lists and tensors."""
    assert type(one) is type(two), where
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, two), where
    elif isinstance(one, dict):
        assert one.keys() == two.keys(), where
        for key in one:
            same(one[key], two[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(two), where
        for i, (first, second) in enumerate(zip(one, two, strict=True)):
            same(first, second, f"{where}[{i}]")
    else:
        assert one == two, where


# 2: in the warm-up, whose pairs have to be made again; 14: after all kinds of iterations, and in the second epoch (an epoch is
# 12 batches of 8). Not 3, since checkpoints are taken between iterations.
@pytest.mark.parametrize("cut", [2, 14])
def test_resumed_run_equals_the_uninterrupted_one(base: Base, shards: Path, tmp_path: Path, cut: int) -> None:
    folder = base("sd-v_prediction")
    all_batches, straight = Witness(tmp_path / "cut.ckpt", cut), module_for(folder)
    trainer = fit(straight, shards, 2 * ITERATIONS, batch_size=8, callbacks=[all_batches])
    trainer.save_checkpoint(tmp_path / "straight.ckpt")

    torch.manual_seed(12345)  # the global state must not matter
    rest, resumed = Witness(), module_for(folder)
    trainer = fit(
        resumed, shards, 2 * ITERATIONS, batch_size=8, callbacks=[rest], ckpt_path=str(tmp_path / "cut.ckpt")
    )
    trainer.save_checkpoint(tmp_path / "resumed.ckpt")

    assert rest.seen == all_batches.seen[cut:]
    assert (resumed.iterations, resumed.student_updates) == (ITERATIONS, 2 + 3)
    contents = [torch.load(tmp_path / f"{name}.ckpt", weights_only=False) for name in ("straight", "resumed")]
    for part in (
        "state_dict",
        "optimizer_states",
        "lr_schedulers",
        "iterations",
        "student_updates",
        "global_step",
        "epoch",
    ):
        same(contents[0][part], contents[1][part], part)
    ema = straight.ema
    assert ema is not None and any(name.startswith("ema.") for name in contents[0]["state_dict"])


def test_finished_run_does_nothing_when_resumed(base: Base, shards: Path, tmp_path: Path) -> None:
    module = module_for(base("sd-epsilon"), max_student_updates=3)
    fit(module, shards, 50).save_checkpoint(tmp_path / "done.ckpt")
    assert (module.student_updates, module.iterations) == (3, 4)
    again = module_for(base("sd-epsilon"), max_student_updates=3)
    witness = Witness()
    fit(again, shards, 50, callbacks=[witness], ckpt_path=str(tmp_path / "done.ckpt"))
    assert not witness.seen and (again.student_updates, again.iterations) == (3, 4)


def test_checkpoint_inside_an_iteration_warns(base: Base, shards: Path, tmp_path: Path) -> None:
    module = module_for(base("sd-epsilon"))
    trainer = fit(module, shards, 3)
    assert module.micro_batches == 1
    with pytest.warns(UserWarning, match=r"1 micro-batch\(es\) into an iteration; it lacks their gradients"):
        trainer.save_checkpoint(tmp_path / "inside.ckpt")
