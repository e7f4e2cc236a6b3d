"""A run that was cut off and resumed is the run that was not, to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from sdxs_lightning.batch import TrainingBatch
from sdxs_lightning.modules.curriculum import Curriculum
from sdxs_lightning.modules.discriminator import Discriminator
from sdxs_lightning.modules.fake_score import FakeScore
from sdxs_lightning.modules.lr_schedules import TwoPhaseLR
from sdxs_lightning.modules.one_step_distillation import OneStepDistillation
from sdxs_lightning.modules.pairs import Pairs
from sdxs_lightning.modules.student_generator import StudentGenerator
from sdxs_lightning.objectives.regression import Regression
from tests.training.tiny_distillation import batches_of, distillation, fit

Base = Callable[[str], Path]
TURNS = 9


def module_for(base: Path, max_student_updates: int = 99) -> OneStepDistillation:
    adamw = partial(torch.optim.AdamW, lr=1e-3)
    return distillation(
        base,
        student=StudentGenerator(
            adamw, partial(TwoPhaseLR, total_updates=20, warmup_updates=2, warmup_factor=3.0)
        ),
        fake_score=FakeScore(adamw),
        discriminator=Discriminator(adamw),
        curriculum=Curriculum(
            max_student_updates=max_student_updates,
            critic_updates_per_student_update=2,
            warmup_updates=2,
            fake_score_warmup_turns=1,
        ),
        pairs=Pairs(count=6, sampler_steps=2, sampler_batch_size=4),
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


# 3: inside the warm-up's second turn is not offered (a checkpoint belongs between turns); 2: within the warm-up, whose pairs
# have to be made again; 12: after all kinds of turns, and in the second epoch (an epoch is 12 batches of 8).
@pytest.mark.parametrize("cut", [2, 14])
def test_resumed_run_equals_the_uninterrupted_one(base: Base, shards: Path, tmp_path: Path, cut: int) -> None:
    folder = base("sd-v_prediction")
    whole, straight = Witness(tmp_path / "cut.ckpt", cut), module_for(folder)
    trainer = fit(straight, shards, 2 * TURNS, batch_size=8, callbacks=[whole])
    trainer.save_checkpoint(tmp_path / "straight.ckpt")

    torch.manual_seed(12345)  # the global state must not matter
    rest, resumed = Witness(), module_for(folder)
    trainer = fit(
        resumed, shards, 2 * TURNS, batch_size=8, callbacks=[rest], ckpt_path=str(tmp_path / "cut.ckpt")
    )
    trainer.save_checkpoint(tmp_path / "resumed.ckpt")

    assert rest.seen == whole.seen[cut:]
    assert (resumed.turns, resumed.student_updates) == (TURNS, 2 + 3)
    contents = [torch.load(tmp_path / f"{name}.ckpt", weights_only=False) for name in ("straight", "resumed")]
    for part in (
        "state_dict",
        "optimizer_states",
        "lr_schedulers",
        "turns",
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
    assert (module.student_updates, module.turns) == (3, 4)
    again = module_for(base("sd-epsilon"), max_student_updates=3)
    witness = Witness()
    fit(again, shards, 50, callbacks=[witness], ckpt_path=str(tmp_path / "done.ckpt"))
    assert not witness.seen and (again.student_updates, again.turns) == (3, 4)


def test_checkpoint_inside_a_turn_says_what_is_lost(base: Base, shards: Path, tmp_path: Path) -> None:
    module = module_for(base("sd-epsilon"))
    trainer = fit(module, shards, 3)
    assert module.micro_batches == 1
    with pytest.warns(UserWarning, match=r"1 micro-batch\(es\) into a turn; their gradients are not in it"):
        trainer.save_checkpoint(tmp_path / "inside.ckpt")
