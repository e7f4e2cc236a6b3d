"""A world of Gaussians: what distribution matching does is compared with derivatives of closed forms.

Data is N(m, P), the student's samples are N(b, Q). Stand-ins for the U-Nets say the exact noise prediction of each, so that
everything around them is ours as it is in training: schedule, re-noising, `Denoiser`, `FakeScore`, the student's term and its
objective. References are float64 and know nothing of scores: derivatives of densities and of divergences.

DMD's normaliser is a factor per sample, not per divergence. Where a mean over samples is compared, many elements make it
nearly constant, and the closed form stays comparable.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple, get_args

import pytest
import torch
from diffusers.configuration_utils import FrozenDict
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from sdxs_lightning.core.batch import Conditioning
from sdxs_lightning.core.noise_schedule import NoiseSchedule
from sdxs_lightning.core.seeding import Stream, normal
from sdxs_lightning.core.timesteps import TimestepRange
from sdxs_lightning.networks.denoiser import Denoiser
from sdxs_lightning.networks.discriminator import Discriminator
from sdxs_lightning.networks.fake_score import FakeScore
from sdxs_lightning.objectives import distribution_matching
from sdxs_lightning.objectives.distribution_matching import DistributionMatching
from sdxs_lightning.objectives.f_divergence import Divergence, FDivergence
from sdxs_lightning.objectives.term import DistillationContext, LatentSample

SCHEDULE = NoiseSchedule.scaled_linear()
TIMESTEPS = (20, 100, 300, 500, 700, 900, 980)
DIVERGENCES: tuple[Divergence, ...] = get_args(Divergence)


class GaussianUnet(nn.Module):
    """The exact noise prediction for data N(mean, covariance): -sigma_t times the score at x_t.

    Args:
        mean: (D,), float64, D = C h w.
        covariance: (D, D), or (D,) if diagonal.
        log_ratio: (flat noisy latents, alpha_t, sigma_t) -> (B,), what the bottleneck is to say; None says 0.
    """

    def __init__(
        self,
        mean: Tensor,
        covariance: Tensor,
        log_ratio: Callable[[Tensor, float, float], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.config = FrozenDict()
        self.mean, self.covariance = nn.Parameter(mean), covariance
        self.mid_block = nn.Identity()
        self.log_ratio = log_ratio

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> SimpleNamespace:
        alpha, sigma = alpha_sigma(int(timestep[0]))
        away = sample.flatten(1) - alpha * self.mean
        if self.covariance.ndim == 1:
            score = -away / (alpha**2 * self.covariance + sigma**2)
        else:
            noisy = alpha**2 * self.covariance + sigma**2 * torch.eye(len(self.mean), dtype=torch.float64)
            score = -torch.linalg.solve(noisy, away.T).T
        if self.log_ratio is not None:
            self.mid_block(self.log_ratio(sample.flatten(1), alpha, sigma).view(-1, 1, 1, 1))
        return SimpleNamespace(sample=(-sigma * score).reshape(sample.shape))


def alpha_sigma(timestep: int) -> tuple[float, float]:
    """Of the schedule, without its rounding."""
    abar = float(SCHEDULE._alphas_cumprod64[timestep])
    return math.sqrt(abar), math.sqrt(1 - abar)


def context(real: GaussianUnet, fake: GaussianUnet) -> DistillationContext:
    """The two worlds as the student's term sees them; the discriminator says what the fake one's bottleneck says."""
    optimizer = partial(torch.optim.SGD, lr=0.1)
    fake_score, discriminator = FakeScore(optimizer), Discriminator(optimizer)
    fake_score.denoiser = denoiser(fake)
    discriminator.head = nn.Sequential(nn.Identity())
    return DistillationContext(SCHEDULE, fake_score, denoiser(real), discriminator)


def denoiser(unet: Any) -> Denoiser:
    return Denoiser(unet, SCHEDULE, "epsilon")


def sample_of(latents: Tensor, positions: Tensor) -> LatentSample:
    nothing = Conditioning(prompt_embeds=torch.zeros(len(positions), 1, 1))
    return LatentSample(latents=latents, conditioning=nothing, positions=positions, seed=0)


def objective(timestep: int, f_divergence: FDivergence | None = None) -> DistributionMatching:
    """Without guidance, at one timestep."""
    return DistributionMatching(
        guidance_scale=1.0, timesteps=TimestepRange(timestep, timestep), f_divergence=f_divergence
    )


def cosine(first: Tensor, second: Tensor) -> float:
    first, second = first.flatten().double(), second.flatten().double()
    return float(first @ second / (first.norm() * second.norm()))


# ------------------------------------------------------------------------------------------------------ sample by sample


class Case(NamedTuple):
    """What our term does at one timestep, and what it should do by derivatives of log densities."""

    gradient: Tensor
    expected: Tensor
    score_gap: float
    expected_gap: float


def case(timestep: int) -> Case:
    shape, positions = (2, 2, 3), torch.arange(64)
    real_mean, real_covariance, fake_mean, fake_covariance = _two_gaussians(math.prod(shape))
    noise = normal(0, Stream.STUDENT_NOISE, positions, shape).flatten(1).double()
    clean = fake_mean + noise @ torch.linalg.cholesky(fake_covariance).T
    latents = clean.float().reshape(-1, *shape).requires_grad_()
    sample = sample_of(latents, positions)
    networks = context(GaussianUnet(real_mean, real_covariance), GaussianUnet(fake_mean, fake_covariance))
    loss, scalars = objective(timestep)(sample, networks)
    (gradient,) = torch.autograd.grad(loss, latents)

    at = TimestepRange(timestep, timestep)
    noisy = sample.renoise(SCHEDULE, at, Stream.SCORE_TIMESTEP, Stream.SCORE_NOISE).latents
    noisy = noisy.detach().double().flatten(1)
    real_score = _score(noisy, real_mean, real_covariance, timestep)
    fake_score = _score(noisy, fake_mean, fake_covariance, timestep)
    alpha, sigma = alpha_sigma(timestep)
    real_x0 = (noisy + sigma**2 * real_score) / alpha  # Tweedie
    gap = sigma**2 / alpha * (fake_score - real_score)
    expected = gap / (clean - real_x0).abs().mean(dim=1, keepdim=True) / gap.numel()
    return Case(gradient.flatten(1), expected, scalars["score_gap"].item(), gap.abs().mean().item())


def _score(noisy: Tensor, mean: Tensor, covariance: Tensor, timestep: int) -> Tensor:
    """Derivative of the log density of noised data, by autograd."""
    alpha, sigma = alpha_sigma(timestep)
    at, eye = noisy.clone().requires_grad_(), torch.eye(len(mean), dtype=torch.float64)
    density = MultivariateNormal(alpha * mean, alpha**2 * covariance + sigma**2 * eye)
    return torch.autograd.grad(density.log_prob(at).sum(), at)[0]


@pytest.mark.parametrize("timestep", TIMESTEPS)
def test_every_sample_descends_the_gradient_of_the_log_density_ratio(timestep: int) -> None:
    gradient, expected, score_gap, expected_gap = case(timestep)
    cosines = [cosine(own, wanted) for own, wanted in zip(gradient, expected, strict=True)]
    assert min(cosines) >= 0.999
    # And its length: sigma^2 / alpha of the two scores' difference, over DMD's normaliser, over the number of elements.
    torch.testing.assert_close(
        gradient, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item(), check_dtype=False
    )
    assert score_gap == pytest.approx(expected_gap, rel=1e-3)


NORMALISERS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "none": lambda x, real, fake: torch.ones(()),
    "sum": lambda x, real, fake: (x - real).abs().sum((1, 2, 3), keepdim=True),
    "of the whole batch": lambda x, real, fake: (x - real).abs().mean(),
    "without absolute value": lambda x, real, fake: (x - real).mean((1, 2, 3), keepdim=True),
    "by the fake score": lambda x, real, fake: (x - fake).abs().mean((1, 2, 3), keepdim=True),
    "squares": lambda x, real, fake: (x - real).square().mean((1, 2, 3), keepdim=True).sqrt(),
    "inverse": lambda x, real, fake: 1 / (x - real).abs().mean((1, 2, 3), keepdim=True),
}


@pytest.mark.parametrize("wrong", NORMALISERS)
def test_no_other_normaliser_would_pass(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def gradient(x: Tensor, real: Tensor, fake: Tensor) -> Tensor:
        return ((fake - real) / NORMALISERS[wrong](x, real, fake)).detach()

    monkeypatch.setattr(distribution_matching, "distribution_matching_gradient", gradient)
    own, expected, *_ = case(500)
    assert ((own - expected).norm() / expected.norm()).item() > 0.1


def _two_gaussians(dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Means and full covariances that share no axes."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(2, dim, generator=generator, dtype=torch.float64)
    factors = torch.randn(2, dim, dim, generator=generator, dtype=torch.float64) / math.sqrt(dim)
    covariances = factors @ factors.mT + 0.2 * torch.eye(dim, dtype=torch.float64)
    return means[0], covariances[0], means[1], covariances[1]


# ------------------------------------------------------------------------------------- parameters of the student: reverse KL

REAL_MEANS, REAL_STDS = torch.tensor([0.4, -0.2, 0.0, 1.0]), torch.tensor([1.0, 0.7, 1.3, 0.5])
BIASES, LOG_STDS = torch.tensor([0.0, 0.3, -0.5, 0.6]), torch.tensor([0.2, -0.3, 0.0, 0.3])


@pytest.mark.parametrize("timestep", TIMESTEPS)
def test_a_student_descends_the_closed_form_kl(timestep: int) -> None:
    shape, positions = (4, 16, 16), torch.arange(512)

    def spread(per_channel: Tensor) -> Tensor:
        return per_channel.double().repeat_interleave(16 * 16)

    biases, log_stds = BIASES.clone().requires_grad_(), LOG_STDS.clone().requires_grad_()
    noise = normal(0, Stream.STUDENT_NOISE, positions, shape)
    latents = biases.view(-1, 1, 1) + log_stds.exp().view(-1, 1, 1) * noise
    networks = context(
        GaussianUnet(spread(REAL_MEANS), spread(REAL_STDS**2)),
        GaussianUnet(spread(BIASES), spread(LOG_STDS.exp() ** 2)),
    )
    loss, _ = objective(timestep)(sample_of(latents, positions), networks)
    gradients = torch.cat(torch.autograd.grad(loss, [biases, log_stds]))

    alpha, sigma = alpha_sigma(timestep)
    b, s = BIASES.double().requires_grad_(), LOG_STDS.double().requires_grad_()
    fake = Normal(alpha * b, (alpha**2 * (2 * s).exp() + sigma**2).sqrt())
    real = Normal(alpha * REAL_MEANS.double(), (alpha**2 * REAL_STDS.double() ** 2 + sigma**2).sqrt())
    expected = torch.cat(torch.autograd.grad(kl_divergence(fake, real).sum(), [b, s]))
    assert cosine(gradients, expected) >= 0.999
    # The other divergence of the pair points elsewhere, so the cosine tells them apart.
    b, s = BIASES.double().requires_grad_(), LOG_STDS.double().requires_grad_()
    fake = Normal(alpha * b, (alpha**2 * (2 * s).exp() + sigma**2).sqrt())
    other = torch.cat(torch.autograd.grad(kl_divergence(real, fake).sum(), [b, s]))
    if timestep <= 500:  # later all divergences are nearly one quadratic form
        assert cosine(gradients, other) < 0.99


# ------------------------------------------------------------------------------- parameters of the student: f-divergences

REAL_MEAN, REAL_STD, FAKE_MEAN, FAKE_LOG_STD = 0.0, 1.0, 1.5, math.log(1.3)
"""One element of the latents differs between the worlds, the others are N(0, 1) in both. The samples are the wider ones:
else the ratio would have an infinite variance over them."""

FUNCTIONS: dict[Divergence, Callable[[Tensor], Tensor]] = {
    "reverse_kl": lambda r: -r.log(),
    "jensen_shannon": lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(),
    "hellinger": lambda r: 1 - r.sqrt(),
    "forward_kl": lambda r: r * r.log(),
    "jeffreys": lambda r: (r - 1) * r.log(),
}


@pytest.mark.parametrize("timestep", [20, 100, 300, 600])
def test_a_student_descends_each_f_divergence(timestep: int) -> None:
    own = {divergence: _our_gradient(divergence, timestep) for divergence in DIVERGENCES}
    exact = {divergence: _exact_gradient(divergence, timestep) for divergence in DIVERGENCES}
    for divergence in DIVERGENCES:
        cosines = {other: cosine(own[divergence], exact[other]) for other in DIVERGENCES}
        assert cosines[divergence] >= 0.999, (divergence, cosines)
        if timestep <= 300:  # at high noise all divergences are one quadratic form
            assert max(cosines, key=lambda other: cosines[other]) == divergence, (divergence, cosines)


def _our_gradient(divergence: Divergence, timestep: int) -> Tensor:
    shape, positions = (4, 4, 4), torch.arange(16384)
    mean, log_std = (
        torch.tensor(FAKE_MEAN, requires_grad=True),
        torch.tensor(FAKE_LOG_STD, requires_grad=True),
    )
    noise = normal(0, Stream.STUDENT_NOISE, positions, shape).flatten(1)
    first = mean + log_std.exp() * noise[:, :1]
    latents = torch.cat([first, noise[:, 1:]], dim=1).reshape(-1, *shape)

    def with_first(value: float, others: float) -> Tensor:
        values = torch.full((math.prod(shape),), others, dtype=torch.float64)
        values[0] = value
        return values

    networks = context(
        GaussianUnet(with_first(REAL_MEAN, 0.0), with_first(REAL_STD**2, 1.0)),
        GaussianUnet(
            with_first(FAKE_MEAN, 0.0), with_first(math.exp(2 * FAKE_LOG_STD), 1.0), log_ratio=_log_ratio
        ),
    )
    wide = FDivergence(divergence, min_ratio=1e-9, max_ratio=1e9)
    term = objective(timestep, wide)
    loss, _ = term(sample_of(latents, positions), networks)
    return torch.stack(torch.autograd.grad(loss, [mean, log_std]))


def _log_ratio(noisy: Tensor, alpha: float, sigma: float) -> Tensor:
    """What the best discriminator says: log of the data's density over the samples'."""
    real = Normal(alpha * REAL_MEAN, math.hypot(alpha * REAL_STD, sigma))
    fake = Normal(alpha * FAKE_MEAN, math.hypot(alpha * math.exp(FAKE_LOG_STD), sigma))
    log_ratio: Tensor = real.log_prob(noisy[:, 0]) - fake.log_prob(noisy[:, 0])
    return log_ratio


def _exact_gradient(divergence: Divergence, timestep: int) -> Tensor:
    """Derivative of D_f(p || q) = integral of q f(p / q), by the trapezoid rule on a wide, fine grid."""
    alpha, sigma = alpha_sigma(timestep)
    mean = torch.tensor(FAKE_MEAN, dtype=torch.float64, requires_grad=True)
    log_std = torch.tensor(FAKE_LOG_STD, dtype=torch.float64, requires_grad=True)
    # As wide as the densities are: a ratio of two numbers that underflow is none.
    x = torch.linspace(-8, 8, 20001, dtype=torch.float64)
    real = Normal(alpha * REAL_MEAN, math.hypot(alpha * REAL_STD, sigma))
    fake = Normal(alpha * mean, (alpha**2 * (2 * log_std).exp() + sigma**2).sqrt())
    log_q = fake.log_prob(x)
    integrand = log_q.exp() * FUNCTIONS[divergence]((real.log_prob(x) - log_q).exp())
    value = torch.trapezoid(integrand, x)
    return torch.stack(torch.autograd.grad(value, [mean, log_std]))
