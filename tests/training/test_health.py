"""The health callback on real, tiny runs: what it measures, when it waits for the device, and when it warns."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from sdxs_lightning.callbacks.diagnosis import Thresholds
from sdxs_lightning.callbacks.health import Health
from sdxs_lightning.core.batch import Conditioning
from sdxs_lightning.core.errors import UserError
from sdxs_lightning.core.seeding import Stream, normal
from sdxs_lightning.core.timesteps import TimestepRange
from sdxs_lightning.families import Family
from sdxs_lightning.networks.discriminator import Discriminator
from sdxs_lightning.networks.fake_score import FakeScore
from sdxs_lightning.networks.student_generator import StudentGenerator
from sdxs_lightning.objectives.adversarial import DiffusionAdversarial
from sdxs_lightning.objectives.denoising import Denoising
from sdxs_lightning.objectives.distribution_matching import DistributionMatching
from sdxs_lightning.objectives.matched_features import EncoderFeatures
from sdxs_lightning.objectives.term import DistillationContext
from sdxs_lightning.stages.distillation.update_schedule import UpdateSchedule
from tests.helpers.tiny import LATENT_SHAPE
from tests.helpers.tiny_distillation import distillation, fit
from tests.training.test_nan_guard import ScalarReads

Base = Callable[[str], Path]
Probe = partial(Health, diversity_prompts=2, samples_per_prompt=4)
READ_TWICE = Thresholds(readings=2)


def adam(lr: float) -> Any:
    return partial(torch.optim.AdamW, lr=lr)


def healthy() -> dict[str, Any]:
    return {
        "student": StudentGenerator(adam(1e-4)),
        "fake_score": FakeScore(adam(1e-3)),
        "discriminator": Discriminator(adam(1e-3)),
    }


class Readings(Callback):
    """What was logged, batch by batch."""

    def __init__(self) -> None:
        self.diversity: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if "student/diversity" in trainer.callback_metrics:
            self.diversity.append(float(trainer.callback_metrics["student/diversity"]))


@pytest.mark.parametrize("kind", ["sd-v_prediction", "sdxl-epsilon"])
def test_a_healthy_run_is_silent_and_logs_everything(
    base: Base, shards: Path, tmp_path: Path, kind: str
) -> None:
    # A random network's epsilon at the last timesteps is no image: its latents are far out from the start.
    health = Probe(2, Thresholds(readings=2, saturation=0.5))
    module = distillation(base(kind), **healthy())
    logger = CSVLogger(tmp_path)
    trainer = fit(module, shards, 6, callbacks=[health], logger=logger, log_every_n_steps=1)
    assert health.warnings == []
    logged = trainer.callback_metrics
    expected = {"score_gap", "relative_score_gap", "fake_score_lag", "mean", "std", "saturation", "diversity"}
    expected |= {"gradient_norm"}
    assert {f"student/{name}" for name in expected} <= set(logged)
    assert "discriminator/accuracy" in logged
    assert any(name.startswith("student/cosine_") for name in logged)
    assert any(name.startswith("student/gradient_norm_") for name in logged)
    assert 0 < logged["student/diversity"] < 2 and 0 < logged["student/fake_score_lag"] < 1.1
    lines = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("student/diversity")
    assert sum(bool(line.split(",")[column]) for line in lines[1:]) == 3  # at updates 2, 4 and 6


def test_diversity_is_the_distance_of_the_real_scores_bottlenecks(base: Base, shards: Path) -> None:
    health = Probe(3, prompts=["a red circle", "a cat"])
    module = distillation(base("sd-v_prediction"), **healthy())
    trainer = fit(module, shards, 3, callbacks=[health])
    noise = normal(0, Stream.EVALUATION, torch.arange(4), LATENT_SHAPE)
    assert module.real_score is not None
    unet, distances = module.real_score.module.unet, []
    for caption in ("a red circle", "a cat"):
        conditioning = module.family.encode_prompts([caption] * 4)
        kept: list[Tensor] = []
        handle = unet.mid_block.register_forward_hook(lambda m, i, output, kept=kept: kept.append(output))
        with torch.no_grad():
            latents = module.student(noise, conditioning)
            unet(latents, torch.zeros(4, dtype=torch.int64), **conditioning.unet_kwargs())
        handle.remove()
        rows = [row.flatten() / row.norm() for row in kept[0].double()]
        distances += [float((one - other).norm()) for one, other in itertools.combinations(rows, 2)]
    expected = sum(distances) / len(distances)
    assert float(trainer.callback_metrics["student/diversity"]) == pytest.approx(expected, rel=1e-4)


class _Mirrored:
    """Features that are the latents themselves, from a source with a network of its own."""

    needs_real_score = False

    def __init__(self) -> None:
        self.calls: list[str] = []

    def build(self, family: Family) -> None:
        self.calls.append("build")

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        self.calls.append("to")

    def frozen_networks(self) -> dict[str, torch.nn.Module]:
        return {}

    def __call__(
        self, latents: Tensor, conditioning: Conditioning, context: DistillationContext
    ) -> dict[str, Tensor]:
        self.calls.append(f"{len(latents)}")
        return {"latents": latents}


def test_features_of_ones_own_on_the_prompts_of_the_first_batch(base: Base, shards: Path) -> None:
    features = _Mirrored()
    health = Health(2, diversity_prompts=3, samples_per_prompt=5, features=features)
    update_schedule = UpdateSchedule(max_student_updates=9, fake_score_updates_per_student_update=2)
    module = distillation(base("sd-v_prediction"), gan=False, update_schedule=update_schedule)
    fit(module, shards, 6, callbacks=[health], shuffled=False)
    assert features.calls == ["build", "to", "5", "5", "5"]
    # Read at the second student update; the iterations of the fake score before and after the third are not counted.
    assert module.student_updates == 3 and set(health._counted.values()) == {1}
    assert health.prompts == ["a red circle", "a green square", "a blue triangle", "a yellow circle"]


def test_between_readings_no_value_is_read(base: Base, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, to_list = Health.on_train_batch_end, torch.Tensor.tolist
    reads: list[int] = []
    active: list[ScalarReads] = []

    def counted_list(tensor: Tensor) -> Any:  # on the CPU it needs no operator
        for mode in active:
            mode.count += 1
        return to_list(tensor)

    def counted(self: Health, *arguments: Any) -> None:
        with ScalarReads() as mode:
            active.append(mode)
            original(self, *arguments)
            active.clear()
        reads.append(mode.count)

    monkeypatch.setattr(torch.Tensor, "tolist", counted_list)
    monkeypatch.setattr(Health, "on_train_batch_end", counted)
    fit(distillation(base("sd-epsilon"), **healthy()), shards, 5, callbacks=[Health(4, diversity_prompts=0)])
    assert [count > 0 for count in reads] == [False, False, False, True, False]


def test_guidance_that_burns_the_samples_is_named(base: Base, shards: Path) -> None:
    """A student that runs after scores guided far too strongly: its latents leave the data, and one another's side."""
    health = Probe(4, READ_TWICE)
    module = distillation(
        base("sd-v_prediction"),
        gan=False,
        student=StudentGenerator(adam(2e-2)),
        fake_score=FakeScore(adam(1e-3)),
        distribution_matching=DistributionMatching(guidance_scale=100.0),
    )
    with pytest.warns(
        UserWarning, match=r"Student update \d+: the student's latents saturate: .*guidance_scale"
    ):
        _loud(module, shards, 12, health)
    causes = {warning.partition(":")[0] for warning in health.warnings}
    assert causes == {"the student's latents saturate", "the student loses diversity"}
    assert len(health.warnings) == 2


def test_a_discriminator_that_wins_is_named(base: Base, shards: Path) -> None:
    """Where next to no noise is added, samples of a student that stands still, far out, differ from data visibly."""
    low = TimestepRange(0, 20)
    health = Probe(5, Thresholds(saturation=None, readings=2), diversity_prompts=0)
    module = distillation(
        base("sd-epsilon"),
        student=StudentGenerator(adam(0.0)),
        fake_score=FakeScore(adam(1e-2)),
        distribution_matching=None,
        discriminator=Discriminator(adam(1e-2)),
        denoising=Denoising(timesteps=low),
        adversarial=DiffusionAdversarial(student_weight=1e-3, discriminator_weight=1.0, timesteps=low),
    )
    with pytest.warns(UserWarning, match=r"the discriminator wins: it tells \d+\.\d% .*student_weight"):
        _loud(module, shards, 20, health)
    assert [warning.partition(":")[0] for warning in health.warnings] == ["the discriminator wins"]


def test_a_fake_score_that_lost_the_student_is_named(base: Base, shards: Path) -> None:
    """One that its own learning rate throws about, which denoises the student's samples worse than the base does."""
    health = Probe(2, Thresholds(readings=2), diversity_prompts=0)
    module = distillation(base("sd-v_prediction"), gan=False, fake_score=FakeScore(adam(0.3)))
    with pytest.warns(
        UserWarning, match="the fake score lags behind the student: .*fake_score_updates_per_student"
    ):
        _loud(module, shards, 5, health)
    assert [warning.partition(":")[0] for warning in health.warnings] == [
        "the fake score lags behind the student"
    ]


def _loud(module: Any, shards: Path, batches: int, health: Health) -> None:
    """`fit` silences warnings; here they are what is tested."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(warnings, "simplefilter", lambda *_: None)
        fit(module, shards, batches, batch_size=8, callbacks=[health])


def test_a_resumed_run_goes_on_as_the_uninterrupted_one(base: Base, shards: Path, tmp_path: Path) -> None:
    found = []
    for stop in (2, 4):
        health, readings = Probe(2), Readings()
        module = distillation(base("sd-v_prediction"), **healthy())
        trainer = fit(module, shards, stop, callbacks=[health, readings])
        if stop == 2:
            trainer.save_checkpoint(tmp_path / "run.ckpt")
            health, readings = Probe(2), Readings()
            module = distillation(base("sd-v_prediction"), **healthy())
            fit(module, shards, 4, callbacks=[health, readings], ckpt_path=str(tmp_path / "run.ckpt"))
        found.append((health.prompts, readings.diversity[-1], health.diagnosis.highest_diversity))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every_n_student_updates": 0}, "Health.every_n_student_updates must be 1 or more, got 0"),
        ({"samples_per_prompt": 1}, "Health.samples_per_prompt must be 2 or more, got 1"),
        ({"diversity_prompts": -1}, "Health.diversity_prompts must be 0 or more, got -1"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Health(**settings)  # type: ignore[arg-type]


def test_features_of_a_network_that_is_not_there_are_refused(base: Base, shards: Path) -> None:
    module = distillation(base("sd-epsilon"), distribution_matching=None)
    health = Health(features=EncoderFeatures())
    with pytest.raises(
        ValueError, match="by EncoderFeatures, and this stage has no network that computes them"
    ):
        fit(module, shards, 1, callbacks=[health])


def test_another_stage_is_refused() -> None:
    with pytest.raises(UserError, match="follows a OneStepDistillation, not a LightningModule"):
        Health().setup(Trainer(accelerator="cpu", logger=False, barebones=True), LightningModule(), "fit")
