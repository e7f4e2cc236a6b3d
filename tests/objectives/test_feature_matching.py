"""Feature matching and segmented score distillation: an independent float64 reference, identities, schedules, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sdxs_lightning.core.timesteps import TimestepRange
from sdxs_lightning.objectives.feature_matching import FeatureMatching, feature_matching_loss, global_ssim
from sdxs_lightning.objectives.segmented_score_distillation import SegmentedScoreDistillation, cosine_ramp


def maps(count: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 5, 7, generator=generator, dtype=dtype) for _ in range(count)]


def reference_ssim(x: list[float], y: list[float]) -> float:
    """SSIM of two lists of numbers by its textbook formula, by hand."""
    n = len(x)
    mean_x, mean_y = math.fsum(x) / n, math.fsum(y) / n
    var_x = math.fsum((v - mean_x) ** 2 for v in x) / n
    var_y = math.fsum((v - mean_y) ** 2 for v in y) / n
    cov = math.fsum((v - mean_x) * (w - mean_y) for v, w in zip(x, y, strict=True)) / n
    c = 1e-6
    return (2 * mean_x * mean_y + c) / (mean_x**2 + mean_y**2 + c) * (2 * cov + c) / (var_x + var_y + c)


def reference_loss(layers: list[tuple[Tensor, Tensor]], weights: list[float]) -> float:
    total = 0.0
    for (x, y), weight in zip(layers, weights, strict=True):
        flat = [x.flatten(2).flatten(0, 1).tolist(), y.flatten(2).flatten(0, 1).tolist()]
        distances = [1 - reference_ssim(a, b) for a, b in zip(*flat, strict=True)]
        total += weight / sum(weights) * math.fsum(distances) / len(distances)
    return total


def test_value_and_gradient_equal_a_float64_reference() -> None:
    x1, y1, x2, y2 = maps(4)
    x2, y2 = 3 * x2[:, :2, :3] + 1, 0.2 * y2[:, :2, :3] - 2
    x1.requires_grad_()
    weights = (1.0, 3.0)
    loss = FeatureMatching(weight=0.7, layer_weights=weights).loss({"a": x1, "b": x2}, {"a": y1, "b": y2})
    loss.backward()

    def value(moved: Tensor) -> float:
        layers = [(moved.double(), y1.double()), (x2.double(), y2.double())]
        return 0.7 * reference_loss(layers, list(weights))

    assert loss.item() == pytest.approx(value(x1.detach()), rel=1e-6)
    assert x1.grad is not None
    for index in [(0, 0, 0, 0), (1, 2, 4, 6), (0, 1, 2, 3)]:
        step = torch.zeros_like(x1, dtype=torch.float64)
        step[index] = 1e-5
        base = x1.detach().double()
        slope = (value(base + step) - value(base - step)) / 2e-5
        assert x1.grad[index].item() == pytest.approx(slope, rel=1e-4, abs=1e-8)


def test_gradient_equals_autograd_of_a_float64_reference_everywhere() -> None:
    x, y = maps(2, torch.float64)
    x.requires_grad_()
    both = torch.stack([x, y])
    mean = both.mean(dim=(3, 4))
    var = both.var(dim=(3, 4), unbiased=False)
    cov = ((x - mean[0][..., None, None]) * (y - mean[1][..., None, None])).mean(dim=(2, 3))
    ssim = (
        (2 * mean[0] * mean[1] + 1e-6)
        / (mean.square().sum(0) + 1e-6)
        * (2 * cov + 1e-6)
        / (var.sum(0) + 1e-6)
    )
    (1 - ssim).mean().backward()
    ours = x.detach().float().requires_grad_()
    feature_matching_loss({"a": ours}, {"a": y.float()}).backward()
    assert x.grad is not None and ours.grad is not None
    scale = x.grad.abs().max()
    assert ((ours.grad - x.grad).abs().max() / scale).item() < 1e-6


def test_equal_maps_are_similar_and_opposite_ones_are_not() -> None:
    x, y = maps(2)
    torch.testing.assert_close(global_ssim(x, x), torch.ones(2, 3), rtol=0, atol=1e-6)
    centred = x - x.mean(dim=(2, 3), keepdim=True)
    torch.testing.assert_close(global_ssim(centred, -centred), -torch.ones(2, 3), rtol=0, atol=1e-4)
    torch.testing.assert_close(global_ssim(x, y), global_ssim(y, x))
    assert global_ssim(x, y).abs().max() < 0.9


def test_a_channel_that_hardly_varies_keeps_its_digits() -> None:
    x, y = (1000 + 1e-2 * part for part in maps(2))
    exact = reference_ssim(x[0, 0].flatten().double().tolist(), y[0, 0].flatten().double().tolist())
    assert global_ssim(x, y)[0, 0].item() == pytest.approx(exact, abs=1e-4)


def test_targets_get_no_gradient() -> None:
    x, y = maps(2)
    y.requires_grad_()
    loss = feature_matching_loss({"a": x.requires_grad_()}, {"a": y})
    loss.backward()
    assert y.grad is None and x.grad is not None


def test_what_feature_matching_refuses() -> None:
    x, y = maps(2)
    with pytest.raises(ValueError, match=r"features of \['a'\] cannot be matched with those of \['b'\]"):
        feature_matching_loss({"a": x}, {"b": y})
    with pytest.raises(ValueError, match=r"layer_weights has 2 numbers for 1 layers \(a\)"):
        feature_matching_loss({"a": x}, {"a": y}, (1.0, 2.0))
    with pytest.raises(ValueError, match=r"shapes must agree, got x \(2, 3, 5, 7\), y \(2, 3, 5, 6\)"):
        global_ssim(x, y[..., :6])
    with pytest.raises(ValueError, match=r"layer_weights\[1\] of FeatureMatching must be positive, got 0"):
        FeatureMatching(layer_weights=(1.0, 0.0))


def test_ramps_fall_on_half_a_cosine() -> None:
    assert cosine_ramp(0.95, 0.5, 0.0) == 0.95
    assert cosine_ramp(0.95, 0.5, 1.0) == 0.5
    assert cosine_ramp(0.95, 0.5, 0.5) == pytest.approx(0.725)
    assert cosine_ramp(1.0, 0.0, 0.25) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert cosine_ramp(0.95, 0.5, -1.0) == 0.95 and cosine_ramp(0.95, 0.5, 7.0) == 0.5


def test_the_segment_shrinks_and_whole_it_is_plain_score_distillation() -> None:
    plain = TimestepRange(20, 980)
    whole = SegmentedScoreDistillation(alpha_start=1.0, alpha_end=1.0, lambda_start=0.0, lambda_end=0.0)
    assert whole.segment(plain, 0.3, 1000) == plain and not whole.matches_features
    falling = SegmentedScoreDistillation()
    assert falling.segment(plain, 0.0, 1000) == TimestepRange(20, 950)
    assert falling.segment(plain, 1.0, 1000) == TimestepRange(20, 500)
    with pytest.raises(
        ValueError, match=r"up to timestep 19 \(alpha 0.019\), and .* begin at 20 only: raise"
    ):
        SegmentedScoreDistillation(alpha_start=0.5, alpha_end=0.019).segment(plain, 1.0, 1000)
    assert falling.feature_matching_ratio(0) == 1.0 and falling.feature_matching_ratio(1) == 0.05


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha_end": 0.0}, r"segmented.alpha_end must be in \(0, 1\], got 0.0"),
        ({"alpha_start": 1.5}, r"segmented.alpha_start must be in \(0, 1\], got 1.5"),
        ({"lambda_end": -1.0}, r"segmented.lambda_end must be 0 or more, got -1.0"),
        ({"lambda_start": math.inf}, r"segmented.lambda_start must be 0 or more, got inf"),
    ],
)
def test_what_segmented_score_distillation_refuses(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SegmentedScoreDistillation(**settings)
