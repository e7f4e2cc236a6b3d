"""What the discriminator sees of an image: each change against plain numpy, its gradient, and what decides it."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from sdxs_lightning.core.seeding import Stream, uniform
from sdxs_lightning.objectives.pixel_adversarial import Augmentation, PixelAdversarial
from sdxs_lightning.stages.distillation.augmentation import (
    NUMBERS,
    augment,
    cover,
    cut_squares,
    recolour,
    shift,
)


def images(count: int = 4, height: int = 8, width: int = 10, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, 3, height, width, generator=generator, dtype=dtype) * 2 - 1


def numbers(count: int = 4, start: int = 0) -> Tensor:
    return uniform(0, Stream.AUGMENTATION, torch.arange(start, start + count), (NUMBERS,))


@pytest.mark.parametrize("strength", [1.0, 0.3])
def test_colours_equal_numpy(strength: float) -> None:
    batch, drawn = images(), numbers()[:, :3]
    for one, found, (b, s, c) in zip(
        batch.numpy(), recolour(batch, drawn, strength), drawn.double().numpy(), strict=True
    ):
        expected = one + strength * (b - 0.5)
        grey = expected.mean(axis=0)
        expected = grey + (1 + strength * (2 * s - 1)) * (expected - grey)
        mean = expected.mean()
        expected = mean + (1 + strength * (c - 0.5)) * (expected - mean)
        np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(recolour(batch, torch.full((4, 3), 0.5), strength), batch)
    assert (recolour(batch, drawn, strength) - batch).abs().mean() > 0.05


def test_colours_at_the_end_of_their_ranges() -> None:
    batch = images()
    grey = recolour(batch, torch.tensor([[0.5, 0.0, 0.5]]).expand(4, -1), 1.0)
    torch.testing.assert_close(grey, batch.mean(dim=1, keepdim=True).expand_as(batch))
    brighter = recolour(batch, torch.tensor([[1.0, 0.5, 0.5]]).expand(4, -1), 1.0)
    torch.testing.assert_close(brighter, batch + 0.5)
    flat = recolour(batch, torch.tensor([[0.5, 0.5, 0.0]]).expand(4, -1), 1.0)
    assert flat[0].std().item() == pytest.approx(0.5 * batch[0].std().item(), rel=1e-6)
    assert flat[0].mean().item() == pytest.approx(batch[0].mean().item(), rel=1e-6)


def test_shifts_equal_numpy() -> None:
    batch = images()
    drawn = torch.tensor([[0.0, 0.0], [0.5, 0.5], [0.9999, 0.3], [0.3, 0.9999]])
    # A quarter of 8 x 10 is 2 and 2 pixels (2.5 is rounded to even): five positions each.
    moves = [(2, 2), (0, 0), (-2, 1), (1, -2)]
    for one, found, (down, right) in zip(batch.numpy(), shift(batch, drawn, 0.25), moves, strict=True):
        expected = np.zeros_like(one)
        for row in range(8):
            for column in range(10):
                if 0 <= row - down < 8 and 0 <= column - right < 10:
                    expected[:, row, column] = one[:, row - down, column - right]
        np.testing.assert_array_equal(found.numpy(), expected)


def test_covers_equal_numpy() -> None:
    batch = images()
    drawn = torch.tensor([[0.0, 0.0], [0.5, 0.5], [0.9999, 0.2], [0.2, 0.9999]])
    # Half of 8 x 10 is 4 x 5, whose centre lies on one of 9 borders between rows, and on one of 10 columns.
    corners = [(-2, -2), (2, 3), (6, 0), (-1, 7)]
    for one, found, (top, left) in zip(batch.numpy(), cover(batch, drawn, 0.5), corners, strict=True):
        expected = one.copy()
        expected[:, max(top, 0) : top + 4, max(left, 0) : left + 5] = 0
        np.testing.assert_array_equal(found.numpy(), expected)


@pytest.mark.parametrize(
    "change",
    [
        partial(recolour, numbers=numbers(2)[:, :3].double(), strength=0.7),
        partial(shift, numbers=numbers(2)[:, 3:5], share=0.25),
        partial(cover, numbers=numbers(2)[:, 5:7], share=0.5),
        partial(cut_squares, places=numbers(2)[:, :2], side_px=3),
    ],
    ids=["recolour", "shift", "cover", "cut_squares"],
)
def test_gradients_equal_finite_differences(change: partial[Tensor]) -> None:
    assert torch.autograd.gradcheck(change, images(2, 4, 6).requires_grad_())


def test_changes_in_their_order_each_by_its_own_numbers() -> None:
    batch, drawn, settings = images(dtype=torch.float32), numbers(), Augmentation()
    expected = cover(shift(recolour(batch, drawn[:, :3], 1.0), drawn[:, 3:5], 0.125), drawn[:, 5:], 0.5)
    assert torch.equal(augment(batch, drawn, settings), expected)
    for name, first, last in (("colour", 0, 3), ("translation", 3, 5), ("cutout", 5, 7)):
        alone = Augmentation(**{"colour": None, "translation": None, "cutout": None, name: 0.5})
        other = drawn.clone()
        other[:, :first], other[:, last:] = 0.9, 0.9
        assert torch.equal(augment(batch, drawn, alone), augment(batch, other, alone))
        assert not torch.equal(augment(batch, drawn, alone), batch)
    nothing = Augmentation(colour=None, translation=None, cutout=None)
    assert torch.equal(augment(batch, drawn, nothing), batch)
    assert augment(batch.bfloat16(), drawn, settings).dtype == torch.float32


def test_an_image_is_changed_by_its_position_and_not_by_its_neighbours() -> None:
    batch = images(dtype=torch.float32)
    whole = augment(batch, numbers(), Augmentation())
    for i in range(4):
        alone = augment(batch[i : i + 1], numbers(1, start=i), Augmentation())
        torch.testing.assert_close(alone, whole[i : i + 1], rtol=0, atol=1e-6)
    assert torch.equal(whole, augment(batch, numbers(), Augmentation()))
    assert not torch.allclose(whole, augment(batch, numbers(start=4), Augmentation()), atol=0.1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"colour": 0.0}, r"augmentation.colour must be in \(0, 1\], or null, got 0.0"),
        ({"colour": 1.5}, r"augmentation.colour must be in \(0, 1\], or null, got 1.5"),
        ({"translation": 1.0}, r"augmentation.translation must be in \(0, 1\), or null, got 1.0"),
        ({"cutout": 0.0}, r"augmentation.cutout must be in \(0, 1\), or null, got 0.0"),
    ],
)
def test_augmentation_settings_are_checked(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augmentation(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"student_weight": 0.0}, "student_weight of PixelAdversarial must be positive, got 0.0"),
        ({"r1_weight": -1.0}, "r1_weight of PixelAdversarial must be positive"),
        ({"crop_px": 0}, "adversarial.crop_px must be 1 or more, or null, got 0"),
    ],
)
def test_pixel_adversarial_settings_are_checked(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PixelAdversarial(**settings)  # type: ignore[arg-type]
