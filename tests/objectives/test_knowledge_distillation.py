"""Knowledge distillation as formulas: against float64 by hand, where gradients go, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from sdxs_lightning.objectives.knowledge_distillation import (
    FeatureDistillation,
    OutputDistillation,
    TaskLoss,
    feature_distillation_losses,
    output_distillation_loss,
)


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def mean_square(one: Tensor, two: Tensor) -> float:
    difference = one.detach().double().numpy() - two.detach().double().numpy()
    return float(np.sum(difference**2) / difference.size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_loss_is_a_mean_in_float32(dtype: torch.dtype) -> None:
    output, wanted = randn(3, 4, 5, 7, seed=0, dtype=dtype), randn(3, 4, 5, 7, seed=1, dtype=dtype)
    loss = OutputDistillation(weight=0.5).loss(output, wanted)
    assert loss.dtype == torch.float32
    reference = mean_square(output.float(), wanted.float())
    assert loss.item() == pytest.approx(0.5 * reference, rel=1e-6)


def test_feature_loss_is_a_mean_a_tap_and_a_sum_over_taps() -> None:
    shapes = {"down_blocks.0": (2, 8, 4, 4), "up_blocks.1": (2, 6, 3), "mid_block": (2, 5)}
    own = {tap: randn(*shape, seed=i) for i, (tap, shape) in enumerate(shapes.items())}
    wanted = {tap: randn(*shape, seed=10 + i) for i, (tap, shape) in enumerate(shapes.items())}
    expected = {tap: mean_square(own[tap], wanted[tap]) for tap in shapes}
    found = feature_distillation_losses(own, wanted)
    assert {tap: loss.item() for tap, loss in found.items()} == pytest.approx(expected, rel=1e-6)
    weighted = FeatureDistillation(weight=2.0, tap_weights={"mid_block": 0.25}).losses(own, wanted)
    factors = {"down_blocks.0": 2.0, "up_blocks.1": 2.0, "mid_block": 0.5}
    for tap, factor in factors.items():
        assert weighted[tap].item() == pytest.approx(factor * expected[tap], rel=1e-6)


def test_only_the_student_gets_gradients() -> None:
    own, wanted = randn(2, 3, seed=0).requires_grad_(), randn(2, 3, seed=1).requires_grad_()
    losses = feature_distillation_losses({"a": own}, {"a": wanted})
    (output_distillation_loss(own, wanted) + losses["a"] + TaskLoss(3.0).loss(own, wanted)).backward()
    assert own.grad is not None and wanted.grad is None
    # d/d own of (1 + 1 + 3) mean (own - wanted)^2
    torch.testing.assert_close(own.grad, 5 * 2 * (own - wanted).detach() / 6)


def test_taps_are_the_default_pairs_or_the_given_ones() -> None:
    default = {"down_blocks.0": "down_blocks.0", "up_blocks.0": "up_blocks.1"}
    assert FeatureDistillation().pairs(default) == default
    assert FeatureDistillation(taps={"mid_block": "mid_block"}).pairs(default) == {"mid_block": "mid_block"}
    without = FeatureDistillation(tap_weights={"down_blocks.0": None, "up_blocks.0": 3.0})
    assert without.pairs(default) == {"up_blocks.0": "up_blocks.1"}


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (
            FeatureDistillation(tap_weights={"up_block.0": 1.0}),
            r"tap_weights names up_block\.0, but the taps",
        ),
        (FeatureDistillation(tap_weights={"up_blocks.0": None}), "no tap left; to do without features, set"),
        (FeatureDistillation(taps={}), "no tap left"),
    ],
)
def test_taps_that_are_refused(objective: FeatureDistillation, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        objective.pairs({"up_blocks.0": "up_blocks.1"})


def test_weights_and_shapes_that_are_refused() -> None:
    for kind in (OutputDistillation, FeatureDistillation, TaskLoss):
        with pytest.raises(ValueError, match=f"weight of {kind.__name__} must be positive, got 0"):
            kind(weight=0)
    with pytest.raises(
        ValueError, match=r"tap_weights\.mid_block of FeatureDistillation must be positive, got -1"
    ):
        FeatureDistillation(tap_weights={"mid_block": -1.0})
    with pytest.raises(ValueError, match=r"output \(1, 4\), teacher_output \(1, 1\)"):
        output_distillation_loss(torch.zeros(1, 4), torch.zeros(1, 1))
    with pytest.raises(
        ValueError, match=r"tap a have shape \(1, 4\) in the student and \(1, 1\) in the teacher"
    ):
        feature_distillation_losses({"a": torch.zeros(1, 4)}, {"a": torch.zeros(1, 1)})
    with pytest.raises(ValueError, match="same taps, got .'a'. and .'b'."):
        feature_distillation_losses({"a": torch.zeros(1)}, {"b": torch.zeros(1)})
