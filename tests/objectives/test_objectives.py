"""Objectives: identities, what is detached, precision, settings and refusals."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sdxs_lightning.core.timesteps import TimestepRange
from sdxs_lightning.objectives import (
    Denoising,
    DiffusionAdversarial,
    DistributionMatching,
    Regression,
    denoising_loss,
    discriminator_loss,
    distribution_matching_gradient,
    distribution_matching_loss,
    generator_loss,
    regression_loss,
)


def latents(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 4, 8, 8, generator=generator) for _ in range(count)]


def test_no_gradient_where_fake_equals_real() -> None:
    pred_x0, real_x0 = latents(2)
    pred_x0.requires_grad_()
    loss = DistributionMatching().loss(pred_x0, real_x0, real_x0.clone())
    loss.backward()
    assert loss.item() == 0
    assert pred_x0.grad is not None
    assert pred_x0.grad.abs().max().item() == 0


def test_a_step_against_the_gradient_moves_from_fake_to_real() -> None:
    # A fake score that estimates the sample itself: then one step of size |x - real| arrives.
    (real_x0,) = latents(1)
    pred_x0 = real_x0 + 2.0
    gradient = distribution_matching_gradient(pred_x0, real_x0, fake_x0=pred_x0)
    torch.testing.assert_close(gradient, torch.ones_like(gradient), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(pred_x0 - 2.0 * gradient, real_x0, rtol=0, atol=1e-5)


def test_the_distribution_matching_gradient_is_per_sample() -> None:
    pred_x0, real_x0, fake_x0 = latents(3)
    whole = distribution_matching_gradient(pred_x0, real_x0, fake_x0)
    for i in range(3):
        one = slice(i, i + 1)
        alone = distribution_matching_gradient(pred_x0[one], real_x0[one], fake_x0[one])
        torch.testing.assert_close(whole[one], alone, rtol=1e-6, atol=1e-6)
    # Scaling everything leaves it: it is normalised.
    torch.testing.assert_close(
        whole, distribution_matching_gradient(9 * pred_x0, 9 * real_x0, 9 * fake_x0), rtol=1e-5, atol=1e-6
    )


def test_a_sample_at_distance_zero_gets_no_push_and_spoils_nothing() -> None:
    pred_x0, real_x0, fake_x0 = latents(3)
    expected = distribution_matching_gradient(pred_x0, real_x0, fake_x0)
    real_x0[1] = pred_x0[1]
    gradient = distribution_matching_gradient(pred_x0, real_x0, fake_x0)
    assert gradient[1].abs().max().item() == 0
    assert torch.equal(gradient[[0, 2]], expected[[0, 2]])


def test_scores_get_no_gradient_from_distribution_matching() -> None:
    pred_x0, real_x0, fake_x0 = (tensor.requires_grad_() for tensor in latents(3))
    gradient = distribution_matching_gradient(pred_x0, real_x0, fake_x0)
    assert not gradient.requires_grad
    DistributionMatching().loss(pred_x0, real_x0, fake_x0).backward()
    assert pred_x0.grad is not None
    assert (real_x0.grad, fake_x0.grad) == (None, None)


@pytest.mark.parametrize("function", [denoising_loss, regression_loss])
def test_targets_get_no_gradient(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    output, target = (tensor.requires_grad_() for tensor in latents(2))
    function(output, target).backward()
    assert output.grad is not None
    assert target.grad is None
    assert function(target, target).item() == 0


def test_the_gan_at_indifference_and_its_directions() -> None:
    zeros = torch.zeros(4)
    assert discriminator_loss(zeros, zeros).item() == pytest.approx(2 * math.log(2))
    assert generator_loss(zeros).item() == pytest.approx(math.log(2))
    real, fake = (torch.zeros(4, requires_grad=True) for _ in range(2))
    discriminator_loss(real, fake).backward()
    assert real.grad is not None
    assert fake.grad is not None
    assert (real.grad < 0).all()  # descent raises the logits of real latents
    assert (fake.grad > 0).all()
    student = torch.zeros(4, requires_grad=True)
    generator_loss(student).backward()
    assert student.grad is not None
    assert (student.grad < 0).all()  # and the student raises its own
    assert generator_loss(torch.full((4,), -1e4)).item() == pytest.approx(1e4)  # no overflow


def test_the_huber_form_meets_the_mean_square_for_small_errors() -> None:
    pred_x0, target = latents(2)
    assert regression_loss(pred_x0, target, 100.0).item() == pytest.approx(
        regression_loss(pred_x0, target).item(), rel=1e-6
    )
    assert regression_loss(pred_x0, target, 0.5) < regression_loss(pred_x0, target)


def test_losses_of_bfloat16_are_float32() -> None:
    pred_x0, real_x0, fake_x0 = (tensor.bfloat16() for tensor in latents(3))
    gradient = distribution_matching_gradient(pred_x0, real_x0, fake_x0)
    for loss in (
        gradient,
        distribution_matching_loss(pred_x0, gradient),
        denoising_loss(pred_x0, real_x0),
        regression_loss(pred_x0, real_x0),
        discriminator_loss(pred_x0[:, 0, 0, 0], real_x0[:, 0, 0, 0]),
        generator_loss(pred_x0[:, 0, 0, 0]),
    ):
        assert loss.dtype == torch.float32
    expected = denoising_loss(pred_x0.float(), real_x0.float())
    assert torch.equal(denoising_loss(pred_x0, real_x0), expected)


def test_weights_multiply() -> None:
    pred_x0, real_x0, fake_x0 = latents(3)
    real, fake = pred_x0[:, 0, 0, 0], real_x0[:, 0, 0, 0]
    gradient = distribution_matching_gradient(pred_x0, real_x0, fake_x0)
    for weighted, plain, weight in (
        (Denoising(weight=3.0).loss(pred_x0, real_x0), denoising_loss(pred_x0, real_x0), 3.0),
        (Regression(2.0, 0.5).loss(pred_x0, real_x0), regression_loss(pred_x0, real_x0, 0.5), 2.0),
        (
            DistributionMatching(weight=0.5).loss(pred_x0, real_x0, fake_x0),
            distribution_matching_loss(pred_x0, gradient),
            0.5,
        ),
        (DiffusionAdversarial().student_loss(fake), generator_loss(fake), 1e-3),
        (DiffusionAdversarial().discriminator_loss(real, fake), discriminator_loss(real, fake), 1e-2),
    ):
        assert weighted.item() == pytest.approx(weight * plain.item(), rel=1e-6)


def test_the_settings_of_dmd2_are_the_defaults() -> None:
    assert Denoising() == Denoising(1.0, TimestepRange(0, 999))
    assert DistributionMatching() == DistributionMatching(1.0, 1.75, TimestepRange(20, 980))
    assert DiffusionAdversarial() == DiffusionAdversarial(1e-3, 1e-2, TimestepRange(0, 999))


def test_refusals() -> None:
    a, b, c = latents(3)
    with pytest.raises(ValueError, match=r"shapes must agree, got output \(3, .* target \(1, "):
        denoising_loss(a, b[:1])
    with pytest.raises(ValueError, match="shapes must agree, got pred_x0 .* fake_x0"):
        distribution_matching_gradient(a, b, c[:1])
    with pytest.raises(ValueError, match="shapes must agree, got pred_x0 .* gradient"):
        distribution_matching_loss(a, b[:1])
    with pytest.raises(ValueError, match="shapes must agree, got pred_x0 .* target"):
        regression_loss(a, b[:1])
    with pytest.raises(ValueError, match="weight of Denoising must be positive, got 0; .* set it to null"):
        Denoising(weight=0)
    with pytest.raises(ValueError, match="weight of DistributionMatching must be positive, got nan"):
        DistributionMatching(weight=float("nan"))
    with pytest.raises(
        ValueError, match="discriminator_weight of DiffusionAdversarial must be positive, got -1"
    ):
        DiffusionAdversarial(discriminator_weight=-1)
    with pytest.raises(ValueError, match="weight of Regression must be positive, got inf"):
        Regression(weight=math.inf)
    with pytest.raises(ValueError, match="huber_delta of Regression must be positive or null, got 0"):
        Regression(huber_delta=0.0)
