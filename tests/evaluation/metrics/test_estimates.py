"""Intervals and extrapolation to infinitely many images, against worlds whose numbers are known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from evaluation.benchmarks import interval_coverage
from evaluation.benchmarks.coverage import CoverageOptions, main
from evaluation.benchmarks.interval_coverage import coverage, metrics
from evaluation.metrics.control_adherence import (
    BarAdherence,
    ControlAdherence,
    DepthAdherence,
    EdgeAdherence,
    ReaderAdherence,
)
from evaluation.metrics.estimates import (
    GROUPS,
    T_95,
    balanced_groups,
    jackknife,
    mean_estimate,
    share_estimate,
    student_t,
)
from evaluation.metrics.frechet import FeatureStatistics, FrechetDistance, frechet_distance
from tests.helpers.refusals import refusal

DIMENSIONS = 16


def gaussian(count: int, seed: int) -> torch.Tensor:
    """Features of mean 0.2 and deviation 1.2, as a generator's would be."""
    generator = torch.Generator().manual_seed(seed)
    return 0.2 + 1.2 * torch.randn(count, DIMENSIONS, generator=generator)


REAL = FeatureStatistics(torch.zeros(DIMENSIONS), torch.eye(DIMENSIONS).double(), 10**6)
TRUTH = DIMENSIONS * (0.2**2 + 0.2**2)
"""|mu|^2 + sum (sigma - 1)^2."""


def test_intervals_cover_what_other_images_would_give_and_infinity_is_the_truth() -> None:
    trials, covered, values, infinities = 40, 0, [], []
    for seed in range(trials):
        metric = FrechetDistance(lambda images: images, DIMENSIONS, REAL)
        metric.add(gaussian(400, seed), range(400))
        found = metric.estimates()["fid"]
        assert found.low is not None and found.high is not None and found.infinity is not None
        assert found.samples == 400
        values.append(found.value)
        infinities.append(found.infinity)
        # The interval, moved to the extrapolated value, is to hold the truth 95 times in 100.
        covered += abs(found.infinity - TRUTH) < found.high - found.value
    mean, extrapolated = sum(values) / trials, sum(infinities) / trials
    bias = mean - TRUTH
    assert bias > 0.1 * TRUTH  # 400 images are too few: FID reads too large
    assert abs(extrapolated - TRUTH) < 0.15 * bias
    assert 0.85 <= covered / trials <= 1.0


def test_the_jackknife_of_a_mean_is_its_standard_error() -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    groups = torch.arange(1000) % GROUPS
    left_out = [float(values[groups != group].mean()) for group in range(GROUPS)]
    found, direct = jackknife(float(values.mean()), left_out, 1000), mean_estimate(values)
    assert found.infinity == pytest.approx(float(values.mean()), abs=1e-12)  # a mean has no bias
    assert found.low is not None and direct.low is not None
    assert found.value - found.low == pytest.approx(direct.value - direct.low, rel=0.5)


def test_the_jackknife_removes_a_bias_of_one_over_n() -> None:
    # The mean square deviation of n numbers is too small by 1/n, the textbook's case.
    values = torch.randn(GROUPS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    left_out = [float(values[torch.arange(GROUPS) != one].var(correction=0)) for one in range(GROUPS)]
    found = jackknife(float(values.var(correction=0)), left_out, GROUPS)
    assert found.infinity == pytest.approx(float(values.var()), rel=1e-12)


def test_an_interval_does_not_leave_the_bounds_of_its_metric() -> None:
    # 29 ones and a 0.9: the normal interval ends at 1.0032.
    nearly = torch.cat([torch.ones(29), torch.tensor([0.9])])
    plain = mean_estimate(nearly)
    assert plain.high is not None and plain.low is not None and plain.high > 1.003
    assert plain.within(0.0, 1.0) == replace(plain, high=1.0)
    assert plain.within(most=0.5) == replace(plain, value=0.5, low=0.5, high=0.5)
    # Every metric of images that has bounds.
    found: dict[type[ControlAdherence], tuple[float, float]] = {
        EdgeAdherence: (0.0, 1.0),
        DepthAdherence: (0.0, 255.0),
        ReaderAdherence: (0.0, 255.0),
        BarAdherence: (0.0, 1.0),
    }
    assert {one: one.bounds for one in found} == found
    edges = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    edges[..., 4, :] = 255
    metric = EdgeAdherence(lambda image: image, tolerance_px=0)
    for index in range(30):
        made = edges.clone()
        if index == 29:
            made[..., 4, 0] = 0
        metric.update_with(made, edges, [index])
    entry = metric.estimate()["edge_f1"]
    assert entry.value == pytest.approx((29 + 14 / 15) / 30) and entry.high == 1.0


def test_mean_of_one_image_has_no_interval() -> None:
    one = mean_estimate(torch.tensor([0.5]))
    assert one.as_dict() == {"value": 0.5, "samples": 1}
    two = mean_estimate(torch.tensor([0.0, 1.0]))
    assert two.low == pytest.approx(0.5 - 1.96 * 0.5**0.5 / 2**0.5)


def test_groups_are_of_one_size_and_do_not_follow_the_ids() -> None:
    groups = balanced_groups(torch.arange(5000))
    assert groups.bincount(minlength=GROUPS).tolist() == [500] * GROUPS
    for count in (20, 23, 57):  # hashing the ids into groups left some of them empty
        ids = 7 * torch.arange(count) + 3
        sizes = balanced_groups(ids).bincount(minlength=GROUPS)
        assert int(sizes.max()) - int(sizes.min()) <= 1
        share = ids[count // 3 :]  # what one of several ranks holds
        assert torch.equal(balanced_groups(share, ids), balanced_groups(ids)[count // 3 :])
    neighbours = (groups[1:] == groups[:-1]).double().mean()
    assert float(neighbours) < 0.3


def test_fewer_images_than_dimensions_by_either_route() -> None:
    features, other = gaussian(10, 0).double(), gaussian(12, 1).double()
    a, b = FeatureStatistics.from_features(features), FeatureStatistics.from_features(other)
    assert a.root is not None and b.root is not None
    by_roots = frechet_distance(a.mean, a.covariance, b.mean, b.covariance, a.root, b.root)
    by_eigenvalues = frechet_distance(a.mean, a.covariance, b.mean, b.covariance)
    assert by_roots == pytest.approx(by_eigenvalues, rel=1e-10)
    torch.testing.assert_close(a.root @ a.root.T, a.covariance)


def test_unequal_groups_are_weighted() -> None:
    # Of a mean, the jackknife with groups of any size estimates the variance of the mean without bias.
    generator = torch.Generator().manual_seed(3)
    groups = torch.tensor([0] * 1 + [1] * 19 + [k for k in range(2, GROUPS) for _ in range(10)])
    sizes = groups.bincount().tolist()
    variances = []
    for _ in range(400):
        values = torch.randn(len(groups), generator=generator, dtype=torch.float64)
        left_out = [float(values[groups != group].mean()) for group in range(GROUPS)]
        found = jackknife(float(values.mean()), left_out, len(groups), sizes=sizes)
        assert found.infinity == pytest.approx(float(values.mean()), abs=1e-12)
        assert found.high is not None
        variances.append(((found.high - found.value) / T_95) ** 2)
    assert sum(variances) / 400 == pytest.approx(1 / len(groups), rel=0.1)


def test_a_share_of_one_has_an_interval() -> None:
    found = share_estimate(torch.ones(50))
    assert (found.value, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(50 / (50 + 1.96**2), rel=1e-12)  # Wilson's lower end at 50 of 50
    half = share_estimate(torch.tensor([0.0, 1.0] * 200))
    assert half.low is not None and half.low == pytest.approx(0.5 - 0.98 / 400**0.5, abs=1e-3)


def test_student_t_is_the_tables() -> None:
    for freedom, expected in ((9, 2.2622), (15, 2.1314), (99, 1.9842), (999, 1.9623)):
        assert student_t(freedom) == pytest.approx(expected, abs=5e-4)


def test_no_interval_of_fid_is_below_zero_and_few_images_are_not_extrapolated() -> None:
    metric = FrechetDistance(
        lambda images: images, DIMENSIONS, FeatureStatistics.from_features(gaussian(5000, 99))
    )
    metric.add(gaussian(20, 0), range(20))
    found = metric.estimates()["fid"]
    assert found.low is not None and found.low >= 0
    assert found.infinity is None
    metric.add(gaussian(200, 1), range(100, 300))
    many = metric.estimates()["fid"]
    assert many.infinity is not None and 0 <= many.infinity < many.value


@pytest.mark.parametrize(
    ("metric", "trials", "bound"),
    [("fid", 150, 0.88), ("kid", 150, 0.88), ("cmmd", 100, 0.88), ("precision and recall", 60, 0.85)],
)
def test_intervals_hold_the_mean_of_other_draws(metric: str, trials: int, bound: float) -> None:
    # The committed evaluation/results/coverage.json has the percentages; this is a smaller run of the same benchmark.
    found = coverage(metrics(100)[metric], 100, trials)
    for name, row in found.items():
        assert row["coverage"] >= bound, (name, row)
        assert row["half_width"] > 0


def test_the_coverage_command_keeps_what_it_has_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, build = tmp_path / "coverage.json", interval_coverage.coverage

    def stopped(make: Any, count: int, trials: int) -> dict[str, dict[str, float]]:
        found = build(make, count, trials)
        if "mean" in found:
            raise KeyboardInterrupt
        return found

    known = {"coverage_of_95_percent_intervals": {"7": {"fid": {"coverage": 0.5}}}}
    out.write_text(json.dumps(known))
    monkeypatch.setattr(interval_coverage, "coverage", stopped)
    options = CoverageOptions(counts=(50,), scale=0.002, metrics=("fid", "mean of images"), out=out)
    with pytest.raises(KeyboardInterrupt):
        interval_coverage.run(options)
    table = json.loads(out.read_text())["coverage_of_95_percent_intervals"]
    assert table["7"] == known["coverage_of_95_percent_intervals"]["7"] and list(table) == ["7", "50"]
    assert set(table["50"]) == {"fid"} and 0 <= table["50"]["fid"]["coverage"] <= 1


def test_the_coverage_command_refuses_what_it_cannot_extend(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "coverage.json"
    line = ["--counts", "50", "--scale", "0.002", "--out", out]
    said = refusal(main, [*line, "--metrics", "fid", "fid0"], capsys)
    assert "--metrics has 'fid0', but takes 'fid', 'kid'" in said
    assert not out.exists()
    key = "coverage_of_95_percent_intervals"
    for text in (
        '{"rows": {}}',
        f'{{"{key}": [1]}}',
        f'{{"{key}": {{"fid": {{}}}}}}',
        f'{{"{key}": {{"7": 1}}}}',
    ):
        out.write_text(text)
        assert f"--out '{out}' is there and has no {key}" in refusal(
            main, [*line, "--metrics", "fid"], capsys
        )
        assert out.read_text() == text
    out.write_text("{")
    assert f"{out} is not JSON" in refusal(main, [*line, "--metrics", "fid"], capsys)
