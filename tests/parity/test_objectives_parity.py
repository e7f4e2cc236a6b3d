"""Objectives equal an independent float64 reference in numpy, values and gradients."""

import numpy as np
import numpy.typing as npt
import pytest
import torch

from sdxs_lightning.objectives import (
    denoising_loss,
    discriminator_loss,
    distribution_matching_gradient,
    distribution_matching_loss,
    generator_loss,
    regression_loss,
)

Array = npt.NDArray[np.float64]
SHAPE = (5, 4, 8, 8)


def arrays(count: int, shape: tuple[int, ...] = SHAPE) -> list[Array]:
    return list(np.random.default_rng(0).standard_normal((count, *shape)))


def tensor(array: Array, grad: bool = False) -> torch.Tensor:
    return torch.tensor(array, dtype=torch.float32, requires_grad=grad)


def gradient_of(value: torch.Tensor, variable: torch.Tensor) -> Array:
    (gradient,) = torch.autograd.grad(value, variable)
    return gradient.double().numpy()


def test_denoising() -> None:
    output, target = arrays(2)
    variable = tensor(output, grad=True)
    loss = denoising_loss(variable, tensor(target))
    assert loss.item() == pytest.approx(np.square(output - target).sum() / output.size, rel=1e-6)
    np.testing.assert_allclose(
        gradient_of(loss, variable), 2 * (output - target) / output.size, rtol=0, atol=1e-6
    )


def test_distribution_matching() -> None:
    pred_x0, real_x0, fake_x0 = arrays(3)
    expected = np.empty_like(pred_x0)
    for i in range(len(pred_x0)):  # per sample, by the formula of the paper
        expected[i] = (fake_x0[i] - real_x0[i]) / np.abs(pred_x0[i] - real_x0[i]).mean()
    gradient = distribution_matching_gradient(tensor(pred_x0), tensor(real_x0), tensor(fake_x0))
    np.testing.assert_allclose(gradient.double().numpy(), expected, rtol=1e-6, atol=1e-6)

    variable = tensor(pred_x0, grad=True)
    loss = distribution_matching_loss(variable, gradient)
    assert loss.item() == pytest.approx(0.5 * np.square(expected).mean(), rel=1e-6)
    np.testing.assert_allclose(gradient_of(loss, variable) * pred_x0.size, expected, rtol=0, atol=1e-6)


def softplus(x: Array) -> Array:
    return np.logaddexp(0, x)


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def test_adversarial() -> None:
    real, fake = arrays(2, shape=(7,))
    real, fake = 5 * real, 5 * fake[:6]
    real_logits, fake_logits = tensor(real, grad=True), tensor(fake, grad=True)
    student = generator_loss(fake_logits)
    assert student.item() == pytest.approx(softplus(-fake).mean(), rel=1e-6)
    np.testing.assert_allclose(gradient_of(student, fake_logits), -sigmoid(-fake) / 6, rtol=0, atol=1e-6)
    critic = discriminator_loss(real_logits, fake_logits)
    assert critic.item() == pytest.approx(softplus(fake).mean() + softplus(-real).mean(), rel=1e-6)
    np.testing.assert_allclose(
        gradient_of(discriminator_loss(real_logits, fake_logits), fake_logits),
        sigmoid(fake) / 6,
        rtol=0,
        atol=1e-6,
    )
    np.testing.assert_allclose(gradient_of(critic, real_logits), -sigmoid(-real) / 7, rtol=0, atol=1e-6)


@pytest.mark.parametrize("huber_delta", [None, 0.3, 1.0])
def test_regression(huber_delta: float | None) -> None:
    pred_x0, target = arrays(2)
    error = pred_x0 - target
    if huber_delta is None:
        expected, slope = np.square(error), 2 * error
    else:
        inside = np.abs(error) <= huber_delta
        expected = np.where(inside, np.square(error), huber_delta * (2 * np.abs(error) - huber_delta))
        slope = np.where(inside, 2 * error, 2 * huber_delta * np.sign(error))
    variable = tensor(pred_x0, grad=True)
    loss = regression_loss(variable, tensor(target), huber_delta)
    assert loss.item() == pytest.approx(expected.mean(), rel=1e-6)
    np.testing.assert_allclose(gradient_of(loss, variable), slope / error.size, rtol=0, atol=1e-6)
