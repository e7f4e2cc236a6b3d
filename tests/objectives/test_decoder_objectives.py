"""The decoder's losses against plain numpy in float64, and their refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from sdxs_lightning.objectives.decoder_distillation import (
    ProjectedAdversarial,
    Reconstruction,
    adaptive_weight,
    averaged_l1,
    pixel_mse,
)
from sdxs_lightning.objectives.projected_gan import hinge_discriminator_loss, hinge_generator_loss, r1_penalty
from sdxs_lightning.stages.distillation.augmentation import cut_squares


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("factor", [1, 2, 8])
def test_averaged_l1_equals_numpy(factor: int) -> None:
    images, target = random(2, 3, 16, 24), random(2, 3, 16, 24, seed=1)
    blocks = (images - target).double().numpy().reshape(2, 3, 16 // factor, factor, 24 // factor, factor)
    expected = np.abs(blocks.mean(axis=(3, 5))).mean()
    assert averaged_l1(images, target, factor).item() == pytest.approx(expected, rel=1e-6)


def test_averaged_l1_ignores_detail_inside_a_square() -> None:
    checkerboard = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(8, 8).expand(1, 3, 16, 16)
    images = random(1, 3, 16, 16)
    assert averaged_l1(images + checkerboard, images, 2).item() == pytest.approx(0, abs=1e-6)
    assert averaged_l1(images + checkerboard, images, 1).item() == pytest.approx(1, rel=1e-6)


def test_averaged_l1_is_float32_for_half_images_and_gives_the_target_no_gradient() -> None:
    images, target = random(1, 3, 8, 8).bfloat16().requires_grad_(), random(1, 3, 8, 8).requires_grad_()
    loss = averaged_l1(images, target, 8)
    assert loss.dtype == torch.float32
    loss.backward()
    assert images.grad is not None and target.grad is None


def test_averaged_l1_refuses() -> None:
    with pytest.raises(
        ValueError, match=r"multiples of the factor, got 12x8 and factor 8; change reconstruct"
    ):
        averaged_l1(torch.zeros(1, 3, 12, 8), torch.zeros(1, 3, 12, 8), 8)
    with pytest.raises(ValueError, match="shapes must agree"):
        averaged_l1(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 16, 16), 8)


def test_reconstruction_weighs_both_scales() -> None:
    images, target = random(1, 3, 8, 8), random(1, 3, 8, 8, seed=1)
    coarse, fine = averaged_l1(images, target, 4).item(), averaged_l1(images, target, 1).item()
    both = Reconstruction(weight=2.0, full_resolution_weight=0.5)
    assert both.loss(images, target, vae_factor=4).item() == pytest.approx(2 * coarse + 0.5 * fine, rel=1e-6)
    assert Reconstruction().loss(images, target, vae_factor=4).item() == pytest.approx(coarse, rel=1e-6)
    squared = Reconstruction(weight=2.0, full_resolution_weight=0.5, full_resolution_distance="mse")
    mse = float(np.mean((images - target).double().numpy() ** 2))
    assert pixel_mse(images, target).item() == pytest.approx(mse, rel=1e-6)
    assert squared.loss(images, target, vae_factor=4).item() == pytest.approx(
        2 * coarse + 0.5 * mse, rel=1e-6
    )
    own = Reconstruction(factor=2).loss(images, target, vae_factor=4)
    assert own.item() == pytest.approx(averaged_l1(images, target, 2).item(), rel=1e-6)


def test_hinge_losses_equal_numpy() -> None:
    real, fake = [random(3, 4), random(3, 9, seed=1)], [random(2, 4, seed=2), random(2, 9, seed=3)]
    per_head = [
        np.maximum(0, 1 - r.double().numpy()).mean() + np.maximum(0, 1 + f.double().numpy()).mean()
        for r, f in zip(real, fake, strict=True)
    ]
    assert hinge_discriminator_loss(real, fake).item() == pytest.approx(np.mean(per_head), rel=1e-6)
    means = [f.double().numpy().mean() for f in fake]
    assert hinge_generator_loss(fake).item() == pytest.approx(-np.mean(means), rel=1e-6)
    nothing = [torch.zeros(5, 4)]
    assert hinge_discriminator_loss(nothing, nothing).item() == 2


def test_r1_of_a_linear_head_is_its_squared_weights() -> None:
    weights = [random(6, seed=1).requires_grad_(), random(8, seed=2).requires_grad_()]
    features = [random(4, 6).requires_grad_(), random(4, 8).requires_grad_()]
    logits = [(f * w).sum(dim=1, keepdim=True) for f, w in zip(features, weights, strict=True)]
    penalty = r1_penalty(logits, features)
    expected = np.mean([w.detach().double().square().sum().item() for w in weights])
    assert penalty.item() == pytest.approx(expected, rel=1e-6)
    penalty.backward()  # d/dw of mean over 2 heads of |w|^2
    for weight in weights:
        torch.testing.assert_close(weight.grad, weight.detach())


def test_adaptive_weight() -> None:
    reconstruction, adversarial = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 0.5])
    assert adaptive_weight(reconstruction, adversarial, 0.25, 1e4).item() == pytest.approx(0.25 * 5 / 0.5)
    assert adaptive_weight(reconstruction, adversarial, 0.25, 2.0).item() == 2.0
    assert adaptive_weight(reconstruction, torch.zeros(2), 0.25, 1e4).item() == 1e4


def test_when_the_gan_starts() -> None:
    assert [ProjectedAdversarial(l1_only_share=s).starts_at(300) for s in (0.0, 0.1, 0.5)] == [0, 30, 150]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"l1_only_share": 1.0}, r"adversarial.l1_only_share must be in \[0, 1\), got 1.0"),
        ({"fraction": 0.0}, "fraction of ProjectedAdversarial must be positive, got 0.0"),
        ({"r1_weight": -1.0}, "r1_weight of ProjectedAdversarial must be positive"),
        ({"crop_px": 0}, "adversarial.crop_px must be 1 or more, or null, got 0"),
    ],
)
def test_adversarial_settings_are_checked(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProjectedAdversarial(**settings)  # type: ignore[arg-type]


def test_reconstruction_settings_are_checked() -> None:
    with pytest.raises(ValueError, match=r"reconstruction.factor must be 1 or more, or null, got 0"):
        Reconstruction(factor=0)
    with pytest.raises(ValueError, match="full_resolution_weight of Reconstruction must be positive, got 0"):
        Reconstruction(full_resolution_weight=0.0)


def test_squares_equal_slices_and_pass_gradients() -> None:
    images = random(3, 2, 8, 10).requires_grad_()
    places = torch.tensor([[0.0, 0.0], [0.5, 0.999], [0.9999, 0.3]])
    squares = cut_squares(images, places, 5)
    # Room is 4 rows and 6 columns.
    expected = torch.stack([images[0, :, 0:5, 0:5], images[1, :, 2:7, 5:10], images[2, :, 3:8, 1:6]])
    assert torch.equal(squares, expected)
    squares.sum().backward()
    assert images.grad is not None and images.grad.sum().item() == 3 * 2 * 25
    with pytest.raises(ValueError, match=r"crop_px of the GAN is 9 and the images are only 8x10"):
        cut_squares(images, places, 9)
