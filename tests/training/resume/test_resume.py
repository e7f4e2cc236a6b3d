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
from tests.helpers.resumed_run import same
from tests.helpers.tiny_distillation import batches_of, distillation, fit

Base = Callable[[str], Path]
ITERATIONS = 9


@pytest.fixture(scope="module")
def base(smaller_base: Base) -> Base:
    return smaller_base


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
    """Writes down which samples came, and saves to `path` after a batch, or to several."""

    def __init__(self, path: Path | None = None, batch: int = 0, more: dict[int, Path] | None = None) -> None:
        self.paths = dict(more or {})
        if path is not None:
            self.paths[batch] = path
        self.seen: list[tuple[tuple[str, ...], tuple[int, ...]]] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: TrainingBatch, *_: Any
    ) -> None:
        self.seen.append((tuple(batch.sample_ids), tuple(batch.positions.tolist())))
        if batches_of(trainer) in self.paths:
            trainer.save_checkpoint(self.paths[batches_of(trainer)])


# 2: in the warm-up, whose pairs have to be made again; 14: after all kinds of iterations, and in the second epoch (an epoch is
# 12 batches of 8). Not 3, since checkpoints are taken between iterations.
CUTS = (2, 14)


@pytest.fixture(scope="module")
def straight(base: Base, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Witness]:
    """Folder with a checkpoint at each of CUTS and at the end of one run, and what it saw."""
    folder = tmp_path_factory.mktemp("straight")
    all_batches = Witness(more={cut: folder / f"{cut}.ckpt" for cut in CUTS})
    module = module_for(base("sd-v_prediction"))
    trainer = fit(module, shards, 2 * ITERATIONS, batch_size=8, callbacks=[all_batches])
    trainer.save_checkpoint(folder / "end.ckpt")
    assert module.ema is not None
    return folder, all_batches


@pytest.mark.parametrize("cut", CUTS)
def test_resumed_run_equals_the_uninterrupted_one(
    base: Base, shards: Path, straight: tuple[Path, Witness], tmp_path: Path, cut: int
) -> None:
    folder, all_batches = straight
    torch.manual_seed(12345)  # the global state must not matter
    rest, resumed = Witness(), module_for(base("sd-v_prediction"))
    ckpt_path = str(folder / f"{cut}.ckpt")
    trainer = fit(resumed, shards, 2 * ITERATIONS, batch_size=8, callbacks=[rest], ckpt_path=ckpt_path)
    trainer.save_checkpoint(tmp_path / "resumed.ckpt")

    assert rest.seen == all_batches.seen[cut:]
    assert (resumed.iterations, resumed.student_updates) == (ITERATIONS, 2 + 3)
    files = (folder / "end.ckpt", tmp_path / "resumed.ckpt")
    contents = [torch.load(file, weights_only=False) for file in files]
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
    assert any(name.startswith("ema.") for name in contents[0]["state_dict"])


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
