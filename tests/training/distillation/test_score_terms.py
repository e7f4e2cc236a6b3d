"""Terms of the student's loss that compare scores in another way than distribution matching."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sdxs_lightning.core.batch import Conditioning
from sdxs_lightning.core.noise_schedule import NoiseSchedule
from sdxs_lightning.core.seeding import Stream, integers, normal
from sdxs_lightning.core.timesteps import TimestepRange
from sdxs_lightning.networks.network import no_param_grad
from sdxs_lightning.objectives.decoupled_guidance import DecoupledGuidance
from sdxs_lightning.objectives.distribution_matching import DistributionMatching
from sdxs_lightning.objectives.score_identity import ScoreIdentity
from sdxs_lightning.objectives.term import DistillationContext, LatentSample, term_gradients
from sdxs_lightning.stages.distillation.step import OneStepDistillation
from tests.helpers.tiny import LATENT_SHAPE
from tests.helpers.tiny_distillation import built, distillation, fit, sample_of

Base = Callable[[str], Path]


class GaussianDenoiser:
    """The best denoiser of N(mean, 1): x_0 is expected at alpha_t x_t + sigma_t^2 mean."""

    def __init__(self, mean: float, schedule: NoiseSchedule) -> None:
        self.mean, self.schedule, self.denoiser = mean, schedule, self

    def guided(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning, scale: float) -> Any:
        assert scale == 1.0
        alpha, sigma = self.schedule.alpha_t(timesteps), self.schedule.sigma_t(timesteps)
        return SimpleNamespace(pred_x0=alpha * noisy + sigma**2 * self.mean)


@pytest.mark.parametrize("alpha", [1.0, 1.2])
def test_score_identity_moves_one_gaussian_onto_another(base: Base, alpha: float) -> None:
    """In closed form: samples of N(0, 1) are moved towards data of N(2, 1) by -2 sigma_t^4 over the normaliser.

    The difference 2 sigma_t^2 of the scores does not depend on the sample, so alpha does not matter; with the scores held
    constant the factor would be sigma_t^2.
    """
    module = built(distillation(base("sd-epsilon")))
    schedule = module.family.schedule
    sample = replace(sample_of(module), latents=torch.randn(3, *LATENT_SHAPE).requires_grad_())
    scores = [GaussianDenoiser(mean, schedule) for mean in (2.0, 0.0)]
    context = DistillationContext(schedule, scores[1], scores[0], None)  # type: ignore[arg-type]
    term = ScoreIdentity(alpha=alpha, guidance_scale=1.0, weight=0.5)
    found = term_gradients({"sid": term}, sample, context)[0]["sid"]

    noisy = sample.renoise(schedule, term.timesteps, Stream.SCORE_TIMESTEP, Stream.SCORE_NOISE)
    real = scores[0].guided(noisy.latents, noisy.timesteps, sample.conditioning, 1.0).pred_x0
    distance = (sample.latents - real).abs().mean((1, 2, 3), keepdim=True)
    expected = -0.5 * 2.0 * schedule.sigma_t(noisy.timesteps) ** 4 / distance / found.numel()
    torch.testing.assert_close(found, expected.expand_as(found).detach(), rtol=1e-3, atol=1e-9)


def test_score_identity_is_zero_where_both_scores_agree(base: Base) -> None:
    module = built(distillation(base("sd-v_prediction")))
    term = ScoreIdentity(guidance_scale=2.0, fake_guidance_scale=2.0)
    with no_param_grad(module.fake_score):
        gradients, scalars = term_gradients({"sid": term}, sample_of(module), module.context)
    assert gradients["sid"].abs().max() < 1e-7 and abs(float(scalars["score_identity"].detach())) < 1e-6
    with no_param_grad(module.fake_score):  # guidance of the real score alone is a difference
        unlike, _ = term_gradients(
            {"sid": ScoreIdentity(guidance_scale=2.0)}, sample_of(module), module.context
        )
    assert unlike["sid"].abs().max() > 1e-6


def with_other_fake_score(module: OneStepDistillation) -> OneStepDistillation:
    with torch.no_grad():
        module.get_submodule("fake_score.denoiser.unet").conv_in.weight.mul_(1.2)  # type: ignore[union-attr,operator]
    return module


def estimates(
    module: OneStepDistillation, sample: LatentSample, timesteps: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """The real score's estimates with the prompts and without, each in a pass of its own."""
    schedule = module.family.schedule
    noisy = schedule.alpha_t(timesteps) * sample.latents + schedule.sigma_t(timesteps) * noise
    assert module.real_score is not None
    with torch.no_grad():
        cond = module.real_score.module(noisy, timesteps, sample.conditioning).pred_x0
        uncond = module.real_score.module(noisy, timesteps, sample.conditioning.unconditional()).pred_x0
    return cond, uncond


def test_decoupled_guidance_is_the_guidance_at_noise_of_its_own(base: Base) -> None:
    module = built(distillation(base("sd-epsilon")))
    sample = sample_of(module)
    term = DecoupledGuidance(weight=0.5, guidance_scale=3.0, timesteps=TimestepRange(600, 900))
    found = term_gradients({"guidance": term}, sample, module.context)[0]["guidance"]
    timesteps = integers(0, Stream.GUIDANCE_TIMESTEP, sample.positions, 600, 901)
    noise = normal(0, Stream.GUIDANCE_NOISE, sample.positions, LATENT_SHAPE)
    cond, uncond = estimates(module, sample, timesteps, noise)
    guided = uncond + 3.0 * (cond - uncond)
    distance = (sample.latents.detach() - guided).abs().mean((1, 2, 3), keepdim=True)
    expected = -0.5 * 2.0 * (cond - uncond) / distance / found.numel()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-8)


def test_both_parts_at_the_same_noise_are_distribution_matching(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the normalisers, which are |x - guided| for the whole and |x - cond| for the matching alone."""
    same = SimpleNamespace(GUIDANCE_TIMESTEP=Stream.SCORE_TIMESTEP, GUIDANCE_NOISE=Stream.SCORE_NOISE)
    monkeypatch.setattr("sdxs_lightning.objectives.decoupled_guidance.Stream", same)
    module = with_other_fake_score(built(distillation(base("sd-epsilon"))))
    sample = sample_of(module)
    terms = {
        "whole": DistributionMatching(guidance_scale=3.0),
        "matching": DistributionMatching(guidance_scale=1.0),
        "guidance": DecoupledGuidance(guidance_scale=3.0),
    }
    with no_param_grad(module.fake_score):
        gradients, _ = term_gradients(terms, sample, module.context)
    noisy = sample.renoise(
        module.family.schedule, TimestepRange(20, 980), Stream.SCORE_TIMESTEP, Stream.SCORE_NOISE
    )
    cond, uncond = estimates(module, sample, noisy.timesteps, noisy.noise)
    of_guided, of_cond = (
        (sample.latents.detach() - one).abs().mean((1, 2, 3), keepdim=True)
        for one in (uncond + 3.0 * (cond - uncond), cond)
    )
    parts = of_cond * gradients["matching"] + of_guided * gradients["guidance"]
    torch.testing.assert_close(of_guided * gradients["whole"], parts, rtol=1e-3, atol=1e-6)


def test_terms_that_guide_are_checked(base: Base, shards: Path) -> None:
    with pytest.raises(ValueError, match="DecoupledGuidance.guidance_scale is 1, which is no guidance"):
        DecoupledGuidance(guidance_scale=1.0)
    for without in ({"guidance_rescale": 0.7}, {"guidance_timesteps": TimestepRange(20, 500)}):
        with pytest.raises(ValueError, match="is 1, which is no guidance, so guidance_rescale and"):
            DistributionMatching(guidance_scale=1.0, **without)
    with pytest.raises(ValueError, match="alpha of ScoreIdentity must be a finite number, .* got inf"):
        ScoreIdentity(alpha=float("inf"))
    with pytest.raises(ValueError, match=r"sid.fake_guidance_scale guides the fake score, which learns no"):
        distillation(base("sd-epsilon"), objectives={"sid": ScoreIdentity(fake_guidance_scale=2.0)})
    # Beside distribution matching, both are logged and compared.
    metrics = fit(
        distillation(
            base("sdxl-epsilon"),
            gan=False,
            distribution_matching=DistributionMatching(guidance_scale=1.0),
            objectives={"guidance": DecoupledGuidance(guidance_scale=3.0)},
        ),
        shards,
        batches=1,
    ).callback_metrics
    assert float(metrics["student/gradient_norm_guidance"]) > 0
    assert abs(float(metrics["student/cosine_distribution_matching_guidance"])) <= 1.001
