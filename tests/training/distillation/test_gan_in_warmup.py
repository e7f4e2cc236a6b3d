"""A discriminator that learns beside the student in the warm-up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from sdxs_lightning.core.batch import TrainingBatch
from sdxs_lightning.objectives.adversarial import DiffusionAdversarial
from sdxs_lightning.objectives.term import LatentSample
from sdxs_lightning.stages.distillation.gan import RealBatch
from sdxs_lightning.stages.distillation.update_schedule import UpdateSchedule
from tests.helpers.tiny_distillation import WARMUP, WARMUP_ONLY, built, distillation, fit, moved, weights

Base = Callable[[str], Path]
LATER = UpdateSchedule(max_student_updates=9, warmup_updates=1, fake_score_updates_per_student_update=1)


def adversarial(phase: str, **settings: Any) -> dict[str, Any]:
    features = settings.pop("features", "real_score")
    return {"adversarial": DiffusionAdversarial(0.3, 0.3, features=features, phase=phase, **settings)}  # type: ignore[arg-type]


def test_a_run_of_warmup_alone_trains_it_without_a_fake_score(base: Base, shards: Path) -> None:
    """Against a step by hand: the head moves by its loss on the student's first sample and the batch's latents."""
    module = built(
        distillation(
            base("sd-epsilon"),
            fake_score=None,
            distribution_matching=None,
            update_schedule=WARMUP_ONLY,
            gradient_clip_norm=None,
            **adversarial("always"),
            **WARMUP,
        )
    )
    before = weights(module)
    seen: list[tuple[LatentSample, TrainingBatch]] = []
    keep = module._discriminator_update

    def remember(fake: LatentSample, batch: TrainingBatch) -> None:
        seen.append((fake, batch))
        keep(fake, batch)

    module._discriminator_update = remember  # type: ignore[method-assign]
    metrics = fit(module, shards, batches=1, shuffled=False).callback_metrics
    assert float(metrics["student/adversarial"]) > 0 and float(metrics["student/regression"]) > 0
    assert moved(before, module, "student") > 0.9 and moved(before, module, "discriminator") == 1
    ((fake, batch),) = seen
    assert not fake.latents.requires_grad

    assert module.gan is not None and module.discriminator is not None
    after = weights(module.discriminator)
    module.discriminator.load_state_dict(
        {
            name.removeprefix("discriminator."): value
            for name, value in before.items()
            if name.startswith("disc")
        }
    )
    real = RealBatch(batch, module.family.encode_prompts(batch.captions), seed=0)
    loss, _ = module.gan.discriminator_loss(fake, real, module.context, None)
    loss.backward()
    for name, parameter in module.discriminator.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(
            after[name], parameter.detach() - 0.1 * parameter.grad, rtol=1e-4, atol=1e-6
        )
    assert float(metrics["discriminator/loss"]) == pytest.approx(float(loss.detach()), rel=1e-5)


class Moving(Callback):
    """Whether each batch moved the discriminator."""

    def __init__(self) -> None:
        self.moved: list[bool] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.before = weights(pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.moved.append(moved(self.before, pl_module, "discriminator") > 0)


@pytest.mark.parametrize(
    ("phase", "expected"),
    [("warmup", [True, False]), ("distillation", [False, True]), ("always", [True, True])],
)
def test_it_learns_in_its_phase(base: Base, shards: Path, phase: str, expected: list[bool]) -> None:
    module = distillation(base("sd-epsilon"), update_schedule=LATER, **adversarial(phase), **WARMUP)
    moving = Moving()
    fit(module, shards, batches=2, callbacks=[moving])
    assert moving.moved == expected
    assert ["adversarial" in terms for terms in module.terms] == expected


def test_the_fake_scores_features_come_too_late(base: Base) -> None:
    with pytest.raises(ValueError, match="set adversarial.features to real_score, or adversarial.phase to"):
        distillation(
            base("sd-epsilon"),
            update_schedule=LATER,
            **adversarial("always", features="fake_score"),
            **WARMUP,
        )
