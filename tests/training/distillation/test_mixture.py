"""The stage as a whole on a mixture of eight Gaussians: it makes a one-step student, and no broken loss does.

Real are the training step, the schedule of updates, the objectives, the optimizers and the Trainer; the networks are
`MixtureUnet`s.
Squared MMD to exact samples, with two sets of exact samples at 0.000; for seeds 0, 1, 2:

    before                                              0.302
    400 student updates                                 0.008 0.009 0.008
    150 student updates                                 0.026 0.019 0.019
    150, Jensen-Shannon by the discriminator's ratio    0.025 0.025
    150, GAN alone                                      0.037 0.039
    150, fake score that stands still                   0.135
    60                                                  0.181
    60, GAN alone                                       0.209
    60, target not detached                             0.302
    60, normaliser without absolute value               0.665
    60, sign of the score difference turned             0.675
    60, fake score with the wrong target                0.472
    60, GAN, student's sign turned                      1.218

Other wrong normalisers (of the whole batch, multiplied instead of divided, by the fake score's estimate) only weigh samples
otherwise, and distil as well as the right one; the numbers in test_gaussian_world.py refuse them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import sdxs_lightning.objectives.adversarial as adversarial
import sdxs_lightning.objectives.denoising as denoising
import sdxs_lightning.objectives.distribution_matching as matching
from sdxs_lightning.core.seeding import Stream, normal, uniform
from sdxs_lightning.core.timesteps import TimestepRange
from sdxs_lightning.networks.discriminator import Discriminator
from sdxs_lightning.networks.fake_score import FakeScore
from sdxs_lightning.networks.student_generator import StudentGenerator
from sdxs_lightning.objectives.adversarial import DiffusionAdversarial
from sdxs_lightning.objectives.distribution_matching import DistributionMatching
from sdxs_lightning.objectives.f_divergence import FDivergence
from sdxs_lightning.objectives.term import LatentSample
from sdxs_lightning.stages.distillation.step import OneStepDistillation
from sdxs_lightning.stages.distillation.update_schedule import UpdateSchedule
from tests.helpers.mixture_world import (
    MODES,
    RADIUS,
    SHAPE,
    STD,
    data,
    distil,
    family,
    mmd,
    mode_shares,
    nearest_mode,
)

BATCH_SIZE, UPDATES, BOUND = 256, 400, 0.015
"""Squared MMD that `UPDATES` student updates reach. A smooth ring is at 0.018, seven of the eight modes at 0.031."""
SHORT_UPDATES, SHORT_BOUND = 150, 0.06
"""The same for runs that are compared with broken ones; one Gaussian of the right variance is at 0.11."""
BROKEN_UPDATES, BROKEN_BOUND = 60, 0.25
"""What the right losses are below after so few updates, and broken ones are not."""

true_gradient = matching.distribution_matching_gradient
ADAM = partial(torch.optim.AdamW, betas=(0.0, 0.99), weight_decay=0.0, fused=True)
MATCHING = DistributionMatching(guidance_scale=1.0, timesteps=TimestepRange(20, 500))


def distillation(
    updates: int, fake_score_lr: float = 3e-3, student_lr: float = 5e-3, **settings: Any
) -> OneStepDistillation:
    """DMD2 without GAN unless `settings` say otherwise: two fake score updates for each of the student."""

    def falling(lr: float, steps: int) -> Any:
        return partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=steps, eta_min=0.05 * lr)

    settings.setdefault("distribution_matching", MATCHING)
    return OneStepDistillation(
        family=family(),
        student=StudentGenerator(
            partial(ADAM, lr=student_lr), falling(student_lr, updates), weights="smooth"
        ),
        fake_score=FakeScore(
            partial(ADAM, lr=fake_score_lr), falling(fake_score_lr, 2 * updates), weights="smooth"
        ),
        update_schedule=UpdateSchedule(max_student_updates=updates, fake_score_updates_per_student_update=2),
        ema_decay=0.98,
        **settings,
    )


def gan(student_weight: float) -> dict[str, Any]:
    return {
        "discriminator": Discriminator(partial(ADAM, lr=2e-3)),
        "adversarial": DiffusionAdversarial(student_weight, discriminator_weight=0.3),
    }


def samples(module: OneStepDistillation) -> Tensor:
    """One step of the averaged student, from noise that no run has seen."""
    module.configure_model()
    assert module.ema is not None
    noise = normal(0, Stream.EVALUATION, torch.arange(2000), SHAPE)
    with torch.no_grad():
        latents: Tensor = module.ema(noise, module.family.encode_prompts([""] * 2000))
    return latents


def distance(points: Tensor) -> float:
    """Squared MMD to exact samples that no run has seen; infinite for points that are not numbers."""
    squared = mmd(points, data(torch.arange(10**6, 10**6 + 2000)))
    return squared if math.isfinite(squared) else math.inf


def distilled(updates: int = SHORT_UPDATES, **settings: Any) -> float:
    """Squared MMD after a run."""
    module = distillation(updates, **settings)
    distil(module, BATCH_SIZE)
    return distance(samples(module))


def test_the_bounds_mean_something() -> None:
    exact, positions = data(torch.arange(2000)), torch.arange(2000)
    assert abs(distance(exact)) < 0.002
    assert distance(exact[nearest_mode(exact) > 0]) > 2 * BOUND
    angles = uniform(0, Stream.EVALUATION, positions) * 2 * math.pi
    ring = RADIUS * torch.stack([angles.cos(), angles.sin()], 1)
    assert distance(ring + STD * normal(0, Stream.EVALUATION, positions, (2,))) > 1.1 * BOUND
    assert distance(normal(0, Stream.EVALUATION, positions, SHAPE)) > 1.5 * SHORT_BOUND
    assert distance(samples(distillation(1))) > 4 * SHORT_BOUND


def test_distribution_matching_makes_a_one_step_student() -> None:
    module = distillation(UPDATES)
    distil(module, BATCH_SIZE)
    points = samples(module)
    assert distance(points) < BOUND
    # Points within three standard deviations of a centre: a smooth ring has 0.77 there. Every mode has its share of them.
    shares = mode_shares(points)
    assert shares.sum().item() > 0.82
    assert (shares / shares.sum() * MODES - 1).abs().max().item() < 0.4


def gan_alone() -> dict[str, Any]:
    return gan(0.3) | {"distribution_matching": None, "student_lr": 2e-3}


def jensen_shannon() -> dict[str, Any]:
    return gan(1e-3) | {
        "distribution_matching": replace(MATCHING, f_divergence=FDivergence("jensen_shannon"))
    }


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="distribution matching"),
        pytest.param(gan_alone(), id="GAN alone"),
        pytest.param(jensen_shannon(), id="Jensen-Shannon"),
    ],
)
def test_a_short_run_reaches_the_bound(settings: dict[str, Any]) -> None:
    assert distilled(**settings) < SHORT_BOUND


# -------------------------------------------------------------------------------------- no broken loss reaches the bound


def without_absolute_value(pred_x0: Tensor, real_x0: Tensor, fake_x0: Tensor) -> Tensor:
    return ((fake_x0 - real_x0) / (pred_x0 - real_x0).mean((1, 2, 3), keepdim=True)).detach()


GRADIENT, LOSS = "distribution_matching_gradient", "distribution_matching_loss"
BROKEN: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "sign": (GRADIENT, lambda *estimates: -true_gradient(*estimates)),
    "normaliser without absolute value": (GRADIENT, without_absolute_value),
    "target not detached": (LOSS, lambda x, gradient: 0.5 * (x - (x - gradient)).square().mean()),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_distribution_matching_misses_the_bound(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, function = BROKEN[what]
    monkeypatch.setattr(matching, name, function)
    assert distilled(BROKEN_UPDATES) > BROKEN_BOUND


def test_a_fake_score_that_stands_still_misses_the_bound() -> None:
    assert distilled(fake_score_lr=0.0) > 1.5 * SHORT_BOUND


def test_a_fake_score_that_learns_the_wrong_target_misses_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    right = denoising.denoising_loss
    monkeypatch.setattr(denoising, "denoising_loss", lambda output, target: right(output, -target))
    assert distilled(BROKEN_UPDATES) > BROKEN_BOUND


def test_a_sample_that_is_not_detached_for_the_fake_score_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LatentSample, "detach", lambda self: self)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        distilled(updates=1)


def test_a_gan_whose_student_wants_to_be_recognised_misses_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    right = adversarial.generator_loss
    monkeypatch.setattr(adversarial, "generator_loss", lambda logits: right(-logits))
    assert distilled(BROKEN_UPDATES, **gan_alone()) > BROKEN_BOUND
