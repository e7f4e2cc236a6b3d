"""The Frechet distance: formula, statistics on disk, Metric."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch

from evaluation.metrics.frechet import (
    FeatureStatistics,
    FrechetDistance,
    frechet_distance,
    lower_half,
    trace_of_root,
)


def random_covariance(dimensions: int, samples: int, seed: int) -> torch.Tensor:
    """A covariance with a decaying spectrum, of rank min(dimensions, samples - 1)."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.arange(1, dimensions + 1, dtype=torch.float64) ** -0.7
    features = torch.randn(samples, dimensions, generator=generator, dtype=torch.float64) * scales
    return torch.cov(features.T)


def test_equals_the_closed_form_of_diagonal_gaussians() -> None:
    generator = torch.Generator().manual_seed(0)
    mean_1, mean_2, s_1, s_2 = torch.rand(4, 64, generator=generator, dtype=torch.float64)
    expected = ((mean_1 - mean_2) ** 2 + (s_1 - s_2) ** 2).sum()
    distance = frechet_distance(mean_1, torch.diag(s_1**2), mean_2, torch.diag(s_2**2))
    assert distance == pytest.approx(float(expected), rel=1e-12)


def test_equals_the_square_root_of_the_product() -> None:
    covariance_1, covariance_2 = random_covariance(48, 300, seed=1), random_covariance(48, 300, seed=2)
    mean_1, mean_2 = torch.zeros(48), torch.full((48,), 0.1)
    root = scipy.linalg.sqrtm(covariance_1.numpy() @ covariance_2.numpy())
    expected = 48 * 0.01 + np.trace(covariance_1.numpy() + covariance_2.numpy() - 2 * root.real)
    assert frechet_distance(mean_1, covariance_1, mean_2, covariance_2) == pytest.approx(
        expected, rel=1e-6, abs=1e-8
    )


def test_fewer_samples_than_dimensions_is_exact() -> None:
    generator = torch.Generator().manual_seed(3)
    features_1, features_2 = torch.randn(2, 20, 64, generator=generator, dtype=torch.float64)
    centred_1, centred_2 = features_1 - features_1.mean(0), features_2 - features_2.mean(0)
    cross = torch.linalg.svdvals(centred_1 @ centred_2.T).sum() / 19
    side_1, side_2 = FeatureStatistics.from_features(features_1), FeatureStatistics.from_features(features_2)
    spread = side_1.covariance.trace() + side_2.covariance.trace() - 2 * cross
    expected = float((side_1.mean - side_2.mean).square().sum() + spread)
    distance = frechet_distance(side_1.mean, side_1.covariance, side_2.mean, side_2.covariance)
    assert distance == pytest.approx(expected, abs=1e-12)


def test_pivots_of_rounding_noise_are_not_taken_for_a_rank() -> None:
    full = random_covariance(64, 300, seed=6)
    features = torch.randn(20, 64, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    root = (features - features.mean(0)).T / 19**0.5
    # As cancellation in sums leaves it: no pivot is negative, Cholesky finds nothing to complain about.
    noisy = root @ root.T + 1e-14 * torch.eye(64, dtype=torch.float64)
    assert int(torch.linalg.cholesky_ex(noisy).info) == 0
    expected = float(torch.linalg.svdvals(torch.linalg.cholesky(full).T @ root).sum())
    for pair in ((full, noisy), (noisy, full)):
        assert float(trace_of_root(*pair)) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("dimensions", [5, 64, 67])
def test_bands_give_the_product(dimensions: int) -> None:
    full, other = (random_covariance(dimensions, 300, seed=seed) for seed in (7, 8))
    triangle = torch.linalg.cholesky(full)
    expected = torch.linalg.eigvalsh(triangle.T @ other @ triangle)
    found = torch.linalg.eigvalsh(lower_half(triangle, other))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


def test_equal_sides_are_at_distance_zero_and_order_does_not_matter() -> None:
    covariance_1, covariance_2 = random_covariance(32, 16, seed=4), random_covariance(32, 100, seed=5)
    mean = torch.zeros(32)
    assert frechet_distance(mean, covariance_1, mean, covariance_1) == pytest.approx(0, abs=1e-12)
    there = frechet_distance(mean, covariance_1, mean, covariance_2)
    assert frechet_distance(mean, covariance_2, mean, covariance_1) == pytest.approx(there, rel=1e-10)


def test_different_dimensions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(3,\) and \(4,\) dimensions"):
        frechet_distance(torch.zeros(3), torch.eye(3), torch.zeros(4), torch.eye(4))


def flat(images_uint8: torch.Tensor) -> torch.Tensor:
    """A feature network: the pixels of a 2x2 image."""
    return images_uint8.flatten(1).float()


def small_images(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 2, 2), generator=generator, dtype=torch.uint8)


def test_metric_equals_numpy_and_does_not_depend_on_the_batch_size() -> None:
    real, fake = small_images(50, 0), small_images(40, 1)
    real_side, fake_side = (FeatureStatistics.from_features(flat(images)) for images in (real, fake))
    np.testing.assert_allclose(
        fake_side.covariance, np.cov(flat(fake).double().numpy(), rowvar=False), rtol=1e-12
    )
    expected = frechet_distance(real_side.mean, real_side.covariance, fake_side.mean, fake_side.covariance)
    for batch_size in (1, 7, 40):
        metric = FrechetDistance(flat, 12)
        metric.update(real, real=True)
        for images in fake.split(batch_size):
            metric.update(images)
        metric.update(fake[:0])
        assert float(metric.compute()) == pytest.approx(expected, rel=1e-10)


def test_fixed_reference_gives_the_same_number_and_refuses_real_images() -> None:
    real, fake = small_images(50, 0), small_images(40, 1)
    both, fixed = (
        FrechetDistance(flat, 12),
        FrechetDistance(flat, 12, FeatureStatistics.from_features(flat(real))),
    )
    both.update(real, real=True)
    both.update(fake)
    fixed.update(fake)
    assert float(fixed.compute()) == pytest.approx(float(both.compute()), rel=1e-10)
    with pytest.raises(ValueError, match="built with reference statistics"):
        fixed.update(real, real=True)


def test_reset_keeps_the_real_side_when_asked_to() -> None:
    metric = FrechetDistance(flat, 12, reset_real_features=False)
    metric.update(small_images(50, 0), real=True)
    metric.update(small_images(40, 1))
    first = float(metric.compute())
    metric.reset()
    assert int(metric.fake_count) == 0
    assert int(metric.real_count) == 50
    metric.update(small_images(40, 1))
    assert float(metric.compute()) == first


def test_one_image_is_not_a_distribution() -> None:
    metric = FrechetDistance(flat, 12, FeatureStatistics(torch.zeros(12), torch.eye(12), 10))
    metric.update(small_images(1, 0))
    with pytest.raises(ValueError, match="at least 2 fake images, got 1"):
        metric.compute()


def test_statistics_survive_the_disk_and_refuse_another_protocol(tmp_path: Path) -> None:
    origin = {"split": "test", "clip": "abc"}
    written = FeatureStatistics.from_features(flat(small_images(50, 0)), origin)
    written.save(tmp_path / "stats.npz")
    read = FeatureStatistics.load(tmp_path / "stats.npz", origin)
    assert torch.equal(read.mean, written.mean)
    assert torch.equal(read.covariance, written.covariance)
    assert read.count == 50
    with np.load(tmp_path / "stats.npz") as archive:  # the keys that clean-fid and pytorch-fid read
        assert archive["mu"].shape == (12,)
        assert archive["sigma"].dtype == np.float64
    with pytest.raises(ValueError, match=r"clip: 'abc' != 'def'"):
        FeatureStatistics.load(tmp_path / "stats.npz", {"split": "test", "clip": "def"})
    with pytest.raises(FileNotFoundError, match=r"evaluation\.reference"):
        FeatureStatistics.load(tmp_path / "missing.npz")
