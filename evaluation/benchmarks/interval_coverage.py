"""Coverage of the metrics' 95 % intervals over known Gaussians.

Fake features are drawn in every trial from a Gaussian that differs from the real one; the real features are fixed. An interval
covers if it contains the metric's mean over all trials, the expectation for this generator at the same number of images.
93 to 97 % of 95 % intervals should cover.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from evaluation.metrics.frechet import FeatureStatistics, FrechetDistance
from evaluation.metrics.inception_score import InceptionScore
from evaluation.metrics.kernel_distance import KernelDistance, MaximumMeanDiscrepancy
from evaluation.metrics.precision_recall import PrecisionRecall
from evaluation.metrics.sampled import PerImageMetric, SampledMetric
from evaluation.reports.result_file import read_result, write_result
from evaluation.user_errors import as_user_errors
from sdxs_lightning.core.errors import UserError

if TYPE_CHECKING:
    from evaluation.benchmarks.coverage import CoverageOptions

DIMENSIONS = 16
REAL_IMAGES = 1000
TRIALS = {100: 1000, 1000: 400, 5000: 400}
"""A coverage of 95 % has a standard error of 0.7 percentage points over 1,000 trials, of 1.1 over 400, of 1.3 over 300."""
TRIALS_OF_QUADRATIC = 300
"""Of the metrics whose cost is quadratic, for 1,000 images and more."""
LINEAR = ("fid", "inception score", "mean of images")


class FirstColumn(PerImageMetric):
    """A per-image metric such as CLIP score."""

    names = ("mean",)


def identity(features: Tensor) -> Tensor:
    """Feature network that returns its input."""
    return features


def fake_features(count: int, seed: int) -> Tensor:
    """(count, d) features of mean 0.2 and standard deviation 1.1."""
    generator = torch.Generator().manual_seed(seed)
    return 0.2 + 1.1 * torch.randn(count, DIMENSIONS, generator=generator)


def metrics(count: int) -> dict[str, Callable[[], SampledMetric]]:
    """Constructors of the metrics for this number of images."""
    real = torch.randn(REAL_IMAGES, DIMENSIONS, generator=torch.Generator().manual_seed(10**6))
    statistics = FeatureStatistics.from_features(real)
    size = min(1000, count)
    return {
        "fid": lambda: FrechetDistance(identity, DIMENSIONS, statistics),
        "kid": lambda: KernelDistance(identity, real, subsets=20 if count > size else 1, subset_size=size),
        "kid, subsets of half": lambda: KernelDistance(identity, real, subsets=20, subset_size=size // 2),
        "cmmd": lambda: MaximumMeanDiscrepancy(identity, real, sigma=3.0),
        "precision and recall": lambda: PrecisionRecall(identity, real),
        "inception score": lambda: InceptionScore(identity),
        "mean of images": FirstColumn,
    }


def coverage(build: Callable[[], SampledMetric], count: int, trials: int) -> dict[str, dict[str, float]]:
    """By result: share of trials whose interval contains the mean over the trials, that mean, and the mean half width."""
    found: dict[str, list[tuple[float, float, float]]] = {}
    for trial in range(trials):
        rows = fake_features(count, trial)
        metric = build()
        metric.add(rows[:, :1].double() if isinstance(metric, FirstColumn) else rows, range(count))
        for name, one in metric.estimates().items():
            if one.low is None or one.high is None:  # too few images for an interval
                continue
            found.setdefault(name, []).append((one.value, one.low, one.high))
    results = {}
    for name, rows_of in found.items():
        value, low, high = torch.tensor(rows_of, dtype=torch.float64).T
        inside = (low <= value.mean()) & (value.mean() <= high)
        results[name] = {
            "coverage": round(float(inside.double().mean()), 4),
            "mean": float(value.mean()),
            "half_width": float((high - low).mean() / 2),
            "trials": trials,
        }
    return results


def coverage_rows(
    counts: Sequence[int], scale: float, wanted: Sequence[str] | None = None
) -> Iterator[tuple[str, str, dict[str, float]]]:
    """Number of images, metric, and its coverage, one after the other as they are measured."""
    for count in counts:
        for name, build in metrics(count).items():
            if wanted and name not in wanted:
                continue
            trials = TRIALS.get(count, 300)
            if name not in LINEAR and count >= 1000:
                trials = min(trials, TRIALS_OF_QUADRATIC)
            trials = max(2, round(trials * scale))
            started = time.perf_counter()
            for number, row in coverage(build, count, trials).items():
                own = name in (number, "precision and recall", "inception score", "mean of images")
                label = number if own else name
                sys.stderr.write(f"N = {count}, {label}: {row['coverage']:.1%} of {trials}\n")
                yield str(count), label, row
            sys.stderr.write(f"  {time.perf_counter() - started:.0f} s\n")


@as_user_errors()
def run(options: CoverageOptions) -> str | None:
    """Run the trials; each result is written at once, beside the file's for other numbers of images and other metrics."""
    torch.set_num_threads(1)
    accepted = metrics(REAL_IMAGES)
    for name in options.metrics:
        if name not in accepted:
            raise UserError(f"--metrics has '{name}', but takes {', '.join(map(repr, accepted))}.")
    table = _known(options.out) if options.out is not None and options.out.is_file() else {}
    for count, label, row in coverage_rows(options.counts, options.scale, options.metrics):
        table.setdefault(count, {})[label] = row
        table = {key: table[key] for key in sorted(table, key=int)}
        if options.out is not None:
            write_result(options.out, _result(table))
    return json.dumps(_result(table), indent=2) if options.out is None else None


def _known(file: Path) -> dict[str, Any]:
    """The table of an earlier run."""
    table = read_result(file).get("coverage_of_95_percent_intervals")
    if not isinstance(table, dict) or not all(
        key.isdecimal() and isinstance(table[key], dict) for key in table
    ):
        raise UserError(
            f"--out '{file}' is there and has no coverage_of_95_percent_intervals by number of images, so it is not of this "
            "command; give another file."
        )
    return table


def _result(table: dict[str, Any]) -> dict[str, Any]:
    return {"dimensions": DIMENSIONS, "real_images": REAL_IMAGES, "coverage_of_95_percent_intervals": table}
