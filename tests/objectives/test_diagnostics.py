"""Health statistics against plain arithmetic, and the causes that readings are turned into."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import pytest
import torch

from sdxs_lightning.callbacks.diagnosis import Diagnosis, Thresholds
from sdxs_lightning.callbacks.sample_diversity import pairwise_distance
from sdxs_lightning.objectives.diagnostics import REACH, latent_stats, score_stats

Stats = Mapping[str, float]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_latent_stats_count_what_lies_beyond_the_data() -> None:
    latents, data = random(4, 4, 16, 16), random(8, 4, 16, 16, seed=1) * 0.25
    latents[0, 0, 0, :3] = torch.tensor([1.5, -1.5, 0.9])
    reach = REACH * np.std(data.double().numpy(), ddof=1)
    stats = latent_stats(latents, data)
    outside = np.abs(latents.double().numpy()) > reach
    assert stats["saturation"].item() == pytest.approx(outside.mean(), abs=1e-9) and outside.mean() > 0.2
    assert stats["mean"].item() == pytest.approx(latents.double().mean().item(), abs=1e-6)
    assert stats["std"].item() == pytest.approx(latents.double().std().item(), rel=1e-5)
    # The scale of the base does not count.
    assert latent_stats(7 * latents, 7 * data)["saturation"] == stats["saturation"]


def test_without_data_latents_have_unit_variance() -> None:
    latents = torch.zeros(1, 1, 10, 10)
    latents[0, 0, 0, :4] = torch.tensor([3.9, -4.1, 4.1, -3.9])
    assert latent_stats(latents, None)["saturation"].item() == pytest.approx(0.02)


def test_score_stats_are_their_formulas() -> None:
    pred, real, fake = random(3, 4, 5, 5), random(3, 4, 5, 5, seed=1), random(3, 4, 5, 5, seed=2)
    stats = {name: value.item() for name, value in score_stats(pred, real, fake).items()}
    p, r, f = (tensor.double().numpy() for tensor in (pred, real, fake))
    assert stats["score_gap"] == pytest.approx(np.abs(f - r).mean(), rel=1e-5)
    assert stats["relative_score_gap"] == pytest.approx(np.abs(f - r).mean() / np.abs(p - r).mean(), rel=1e-5)
    assert stats["fake_score_lag"] == pytest.approx(
        np.square(p - f).mean() / np.square(p - r).mean(), rel=1e-5
    )


def test_a_fake_score_that_keeps_up_has_no_lag_whatever_the_real_score() -> None:
    """Student N(0, 1), re-noised: the posterior mean alpha x_t is the best denoiser, and any real score is another."""
    x, alpha = random(64, 4, 16, 16), 0.6
    noisy = alpha * x + (1 - alpha**2) ** 0.5 * random(64, 4, 16, 16, seed=1)
    best = alpha * noisy
    for slope, offset in ((0.2, 0.0), (1.4, 0.0), (alpha, 0.5)):
        assert score_stats(x, slope * noisy + offset, best)["fake_score_lag"] < 1
        assert score_stats(x, best, slope * noisy + offset)["fake_score_lag"] > 1
    assert score_stats(x, best, best)["fake_score_lag"] == 1
    assert score_stats(x, x, x)["fake_score_lag"] == 1 and score_stats(x, x, x)["relative_score_gap"] == 0
    assert not any(value.requires_grad for value in score_stats(x.requires_grad_(), best, noisy).values())


def test_pairwise_distance_is_the_mean_over_pairs_and_layers() -> None:
    layers = {"a": random(5, 3, 4, 4), "b": random(5, 6, 2, 2, seed=1) + 2}
    expected = []
    for features in layers.values():
        rows = features.double().flatten(1).numpy()
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        pairs = [np.linalg.norm(rows[i] - rows[j]) for i in range(5) for j in range(i)]
        expected.append(np.mean(pairs))
    assert pairwise_distance(layers).item() == pytest.approx(np.mean(expected), rel=1e-5)
    scaled = {name: 100 * features for name, features in layers.items()}
    assert pairwise_distance(scaled).item() == pytest.approx(np.mean(expected), rel=1e-5)


def test_equal_samples_have_no_distance_and_orthogonal_ones_root_two() -> None:
    assert pairwise_distance({"x": random(1, 8, 4, 4).expand(4, -1, -1, -1)}) == 0
    # A tenth of a percent apart is seen, where 1 - cos of float32 would be rounding.
    base = random(1, 8, 4, 4)
    assert 5e-4 < pairwise_distance({"x": torch.cat([base, base + 1e-3 * random(1, 8, 4, 4, seed=1)])}) < 2e-3
    assert pairwise_distance({"x": torch.eye(4)}).item() == pytest.approx(2**0.5)
    with pytest.raises(ValueError, match="two samples, got 1"):
        pairwise_distance({"x": base})


HEALTHY: Stats = {
    "student/fake_score_lag": 0.9,
    "discriminator/accuracy": 0.6,
    "student/saturation": 0.001,
    "student/diversity": 0.6,
    "student/cosine_distribution_matching_adversarial": -0.1,
}


@pytest.mark.parametrize(
    ("stats", "cause", "advice"),
    [
        (
            {"student/fake_score_lag": 1.6},
            "the fake score lags behind the student: .* 1.60 times",
            "fake_score_updates",
        ),
        ({"discriminator/accuracy": 0.99}, "the discriminator wins: it tells 99.0%", "learning rate"),
        (
            {"student/saturation": 0.3},
            "the student's latents saturate: 30.0% lie beyond four",
            "guidance_scale",
        ),
        (
            {"student/diversity": 0.2},
            "the student loses diversity: .* 0.200 apart, and were 0.600",
            "guidance_scale",
        ),
        (
            {"student/cosine_distribution_matching_adversarial": -0.95},
            r"oppose each other \(distribution_matching_adversarial\): .* is -0.95",
            "weight of one",
        ),
    ],
    ids=["lag", "discriminator", "saturation", "diversity", "cosine"],
)
def test_a_lasting_symptom_is_reported_once_by_its_cause(stats: Stats, cause: str, advice: str) -> None:
    diagnosis = Diagnosis(Thresholds(readings=3))
    assert all(diagnosis.read(HEALTHY) == [] for _ in range(5))
    readings = [diagnosis.read({**HEALTHY, **stats}) for _ in range(6)]
    assert [len(warnings) for warnings in readings] == [0, 0, 1, 0, 0, 0]
    warning = readings[2][0]
    assert re.search(cause, warning) and advice in warning
    # One good reading, and it counts anew.
    diagnosis.read(HEALTHY)
    assert [len(diagnosis.read({**HEALTHY, **stats})) for _ in range(3)] == [0, 0, 1]


def test_a_symptom_that_comes_and_goes_is_noise() -> None:
    diagnosis = Diagnosis(Thresholds(readings=2))
    bad = {**HEALTHY, "discriminator/accuracy": 1.0, "student/fake_score_lag": 9.0}
    assert [diagnosis.read(stats) for stats in (bad, HEALTHY) * 4] == [[]] * 8


def test_a_threshold_that_is_null_says_nothing() -> None:
    silent = Thresholds(None, None, None, None, None, readings=1)
    bad = {
        "student/fake_score_lag": 9.0,
        "discriminator/accuracy": 1.0,
        "student/saturation": 1.0,
        "student/diversity": 0.0,
        "student/cosine_a_b": -1.0,
    }
    assert Diagnosis(silent).read({"student/diversity": 1.0}) == [] and Diagnosis(silent).read(bad) == []
    assert len(Diagnosis(Thresholds(readings=1)).read(bad)) == 4  # diversity has nothing to compare with yet
    assert Diagnosis(Thresholds(readings=1)).read({}) == []


def test_a_resumed_diagnosis_remembers() -> None:
    before = Diagnosis(Thresholds(readings=2))
    before.read({"student/diversity": 1.0})
    before.read({"student/diversity": 0.3})
    after = Diagnosis(Thresholds(readings=2))
    after.load_state_dict(before.state_dict())
    (warning,) = after.read({"student/diversity": 0.3})
    assert "0.300 apart, and were 1.000" in warning


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"readings": 0}, "thresholds.readings of Health must be 1 or more, got 0"),
        (
            {"fake_score_lag": 0.5},
            r"thresholds.fake_score_lag of Health must be in \[1, inf\] or null, got 0.5",
        ),
        ({"discriminator_accuracy": 95.0}, r"discriminator_accuracy .* in \[0.5, 1\] or null, got 95"),
        ({"cosine": 0.8}, r"cosine of Health must be in \[-1, 0\] or null, got 0.8"),
    ],
)
def test_thresholds_that_make_no_sense(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Thresholds(**settings)  # type: ignore[arg-type]
