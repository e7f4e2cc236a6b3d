"""The weights of other divergences: against the second derivative of f, and against the ratio of two Gaussians."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from sdxs_lightning.objectives.adversarial import discriminator_loss
from sdxs_lightning.objectives.distribution_matching import (
    DistributionMatching,
    distribution_matching_gradient,
    distribution_matching_loss,
)
from sdxs_lightning.objectives.f_divergence import Divergence, FDivergence, divergence_weight

GENERATORS: dict[Divergence, Callable[[np.ndarray], np.ndarray]] = {
    "reverse_kl": lambda r: -np.log(r),
    "jensen_shannon": lambda r: r * np.log(r) - (r + 1) * np.log((r + 1) / 2),
    "hellinger": lambda r: 1 - np.sqrt(r),
    "forward_kl": lambda r: r * np.log(r),
    "jeffreys": lambda r: (r - 1) * np.log(r),
}
"""f of D_f(p || q) = integral of q f(p / q)."""


def test_every_divergence_is_here() -> None:
    assert set(GENERATORS) == set(get_args(Divergence))


@pytest.mark.parametrize("divergence", GENERATORS)
def test_the_weight_is_the_second_derivative_times_the_square(divergence: Divergence) -> None:
    ratio, f = np.geomspace(0.1, 20, 50), GENERATORS[divergence]
    step = 1e-3 * ratio
    curvature = (f(ratio + step) - 2 * f(ratio) + f(ratio - step)) / step**2
    weight = divergence_weight(torch.from_numpy(ratio), divergence).numpy()
    np.testing.assert_allclose(weight, curvature * ratio**2, rtol=2e-6)
    assert f(np.ones(1)).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("divergence", GENERATORS)
def test_weights_are_those_of_the_clipped_ratio_over_their_mean(divergence: Divergence) -> None:
    settings = FDivergence(divergence, min_ratio=0.25, max_ratio=8.0)
    logits = torch.tensor([-1e4, -1.0, 0.0, 1.5, 1e4])
    expected = divergence_weight(
        torch.tensor([0.25, math.exp(-1), 1, math.exp(1.5), 8.0]).double(), divergence
    )
    weights = settings.weights(logits.requires_grad_())
    assert weights.shape == (5, 1, 1, 1) and weights.dtype == torch.float32 and not weights.requires_grad
    torch.testing.assert_close(
        weights.flatten().double(), expected / expected.mean(), rtol=1e-6, atol=0, check_dtype=False
    )
    assert weights.mean().item() == pytest.approx(1, rel=1e-6)


def test_an_optimal_discriminator_gives_the_ratio_of_two_gaussians() -> None:
    # Real N(0.5, 1.2^2), fake N(-0.3, 0.8^2): the best logit is their log ratio, a quadratic in x.
    count, generator = 200_000, torch.Generator().manual_seed(0)
    real = 0.5 + 1.2 * torch.randn(count, generator=generator)
    fake = -0.3 + 0.8 * torch.randn(count, generator=generator)
    log_ratio = torch.distributions.Normal(0.5, 1.2).log_prob(fake) - torch.distributions.Normal(
        -0.3, 0.8
    ).log_prob(fake)
    weights = FDivergence("forward_kl", min_ratio=1e-3, max_ratio=1e3).weights(_fitted_logits(real, fake))
    # Of forward KL the weight is the ratio itself, whose mean over the fake distribution is 1.
    assert log_ratio.exp().mean().item() == pytest.approx(1, abs=0.03)
    torch.testing.assert_close(
        weights.flatten(), log_ratio.exp() / log_ratio.exp().mean(), rtol=0.08, atol=0.02
    )
    for divergence in GENERATORS:
        weights = FDivergence(divergence).weights(_fitted_logits(real, fake)).flatten()
        exact = divergence_weight(log_ratio.exp().clamp(0.1, 20), divergence)
        assert torch.corrcoef(torch.stack([weights, exact]))[0, 1].item() > 0.999 or (
            divergence == "reverse_kl" and torch.equal(weights, torch.ones(count))
        )
        torch.testing.assert_close(weights, exact / exact.mean(), rtol=0.08, atol=0.02)


def _fitted_logits(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator c0 + c1 x + c2 x^2 that minimises our discriminator loss, at the fake points."""
    coefficients = torch.zeros(3, requires_grad=True)

    def logits(x: Tensor) -> Tensor:
        return coefficients[0] + coefficients[1] * x + coefficients[2] * x**2

    optimizer = torch.optim.LBFGS([coefficients], lr=1.0, max_iter=30, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = discriminator_loss(logits(real), logits(fake))
        loss.backward()
        return loss

    optimizer.step(closure)
    return logits(fake).detach()


def test_the_loss_weighs_each_sample_and_reverse_kl_is_plain_distribution_matching() -> None:
    generator = torch.Generator().manual_seed(0)
    pred_x0, real_x0, fake_x0 = (torch.randn(3, 4, 8, 8, generator=generator) for _ in range(3))
    logits = torch.tensor([-2.0, 0.0, 2.0])
    gradient = distribution_matching_gradient(pred_x0, real_x0, fake_x0)
    plain = distribution_matching_loss(pred_x0, gradient)
    reverse = DistributionMatching(f_divergence=FDivergence("reverse_kl"))
    assert torch.equal(reverse.loss(pred_x0, real_x0, fake_x0, logits), plain)
    pred_x0.requires_grad_()
    DistributionMatching(weight=3.0, f_divergence=FDivergence()).loss(
        pred_x0, real_x0, fake_x0, logits
    ).backward()
    h = torch.sigmoid(logits)  # r / (1 + r), Jensen-Shannon, the default
    expected = 3.0 * gradient * (h / h.mean()).view(-1, 1, 1, 1) / gradient.numel()
    assert pred_x0.grad is not None
    torch.testing.assert_close(pred_x0.grad, expected, rtol=1e-5, atol=1e-8)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"divergence 'kl' is not known; accepted are reverse_kl, jensen_"):
        FDivergence("kl")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"needs 0 < min_ratio < max_ratio, got 0.1 and 0.05; change distr"):
        FDivergence(max_ratio=0.05)
    with pytest.raises(ValueError, match=r"needs 0 < min_ratio < max_ratio, got 0.0 and 20"):
        FDivergence(min_ratio=0.0)
    with pytest.raises(ValueError, match=r"at least 2, got shape \(1,\); raise data.init_args.batch_size"):
        FDivergence().weights(torch.zeros(1))
