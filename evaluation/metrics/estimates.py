"""Estimate of a metric: value, number of images and 95 % interval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

GROUPS = 10
"""Groups of the jackknife; each is left out once."""

T_95 = 2.2622
"""Student's t for 95 % and GROUPS - 1 degrees of freedom."""

Z_95 = 1.96


@dataclass(frozen=True)
class Estimate:
    """Value of a metric over a set of images.

    The interval refers to other images of the same generator: in 95 of 100 draws it covers the mean of the metric at the same
    number of images against the same reference. `evaluation.benchmarks.coverage` measures that.
    """

    value: float
    """Value as printed by the tools that the protocol follows."""
    samples: int
    """Number of images without duplicates."""
    low: float | None = None
    """Lower end of the 95 % interval; None where there is none."""
    high: float | None = None
    """Upper end."""
    infinity: float | None = None
    """Value extrapolated to infinitely many samples, for distances with a bias of about c / samples."""
    left_out: tuple[float, ...] | None = None
    """Value without each of the GROUPS groups of `balanced_groups`; None where it is not computed. With those of another model
    at the same samples it gives the interval of the difference, see `difference`."""

    def as_dict(self) -> dict[str, Any]:
        """JSON-serialisable dict without unknown fields."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    def within(self, least: float = -math.inf, most: float = math.inf) -> Estimate:
        """Value and interval clamped to the bounds of the metric; their normal approximation does not know them."""
        value, low, high, infinity = (
            None if each is None else min(max(each, least), most)
            for each in (self.value, self.low, self.high, self.infinity)
        )
        assert value is not None
        return Estimate(value, self.samples, low, high, infinity, self.left_out)


def student_t(freedom: int) -> float:
    """Student's t for a two-sided 95 % interval; accurate to four digits from 8 degrees of freedom.

    Source: Abramowitz and Stegun, 26.7.5.
    """
    z, n = 1.959964, max(freedom, 1)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + terms[0] / n + terms[1] / n**2 + terms[2] / n**3


def mean_estimate(values: Tensor, sample_ids: Tensor | None = None) -> Estimate:
    """Mean of per-image values with its normal 95 % interval (none for a single image).

    Args:
        values: (n,).
        sample_ids: (n,), int64, for `left_out`; None leaves it out.
    """
    values = values.double()
    mean, count = float(values.mean()), len(values)
    if count < 2:
        return Estimate(mean, count)
    half = Z_95 * float(values.std()) / math.sqrt(count)
    return Estimate(mean, count, mean - half, mean + half, None, _means_left_out(values, sample_ids))


def _means_left_out(values: Tensor, sample_ids: Tensor | None) -> tuple[float, ...] | None:
    """Mean without each group; None without ids, or for fewer than two images per group."""
    if sample_ids is None or len(values) < 2 * GROUPS or len(sample_ids.unique()) < len(values):
        return None
    groups = balanced_groups(sample_ids)
    sums = torch.zeros(GROUPS, dtype=torch.float64).index_add_(0, groups, values)
    sizes = groups.bincount(minlength=GROUPS)
    return tuple(((values.sum() - sums) / (len(values) - sizes)).tolist())


def difference(value: float, other: Mapping[str, Any], first: Mapping[str, Any]) -> Estimate | None:
    """The difference of two results of one metric, with the jackknife's interval over the groups that they share.

    Sample i is in the same group of both. Where it comes from the same prompt and noise in both, the difference varies less
    than either value: the interval is that of paired samples.

    Args:
        value: other's value minus the first's.
        other: `Estimate.as_dict` of the same number of samples.
        first: the same.

    Returns:
        None where either lacks `left_out`, or the numbers of samples differ.
    """
    samples = first["samples"]
    parts = [entry.get("left_out") or () for entry in (other, first)]
    if not all(parts) or other["samples"] != samples or len(parts[0]) != len(parts[1]):
        return None
    left_out = [one - another for one, another in zip(*parts, strict=True)]
    # As balanced_groups deals them.
    sizes = [samples // GROUPS + (group < samples % GROUPS) for group in range(GROUPS)]
    return jackknife(value, left_out, samples, biased=False, sizes=sizes)


def share_estimate(hits: Tensor, sample_ids: Tensor | None = None) -> Estimate:
    """Share of ones, with Wilson's 95 % interval, which has positive width at 0 and 1.

    Args:
        hits: (n,), zeros and ones.
        sample_ids: as for `mean_estimate`.

    Source: Wilson, JASA 22 (1927).
    """
    share, count = float(hits.double().mean()), len(hits)
    shrink = 1 + Z_95**2 / count
    centre = (share + Z_95**2 / (2 * count)) / shrink
    half = Z_95 / shrink * math.sqrt(share * (1 - share) / count + Z_95**2 / (4 * count**2))
    left_out = _means_left_out(hits.double(), sample_ids)
    return Estimate(share, count, max(centre - half, 0.0), min(centre + half, 1.0), None, left_out)


def jackknife(
    value: float,
    left_out: Sequence[float],
    samples: int,
    biased: bool = True,
    sizes: Sequence[int] | None = None,
) -> Estimate:
    """Interval and bias of a statistic from its leave-one-group-out values.

    With h = samples / size of group k, pseudo-value k is h * value - (h - 1) * left_out[k]. For equal groups their mean is the
    value without its bias of order 1/n (for FID an extrapolation in 1/N from 0.9 N and N that uses every image equally often),
    and their spread gives the interval. Groups of unequal size are weighted as in the delete-m_j jackknife.

    Args:
        value: statistic over all images.
        left_out: statistic without group k, for each of the GROUPS groups.
        samples: total number of images.
        biased: whether the statistic is too large by about c / n; sets `infinity`.
        sizes: images per group, all positive; None if equal.

    Source: Quenouille (1956), Tukey (1958); unequal groups: Busing et al., Statistics and Computing 9 (1999); FID's bias in
    1/N: Chong and Forsyth, arXiv:1911.07023.
    """
    groups = len(left_out)
    without = torch.tensor(left_out, dtype=torch.float64)
    count = torch.tensor(sizes or [samples / groups] * groups, dtype=torch.float64)
    ratio = samples / count
    mean = groups * value - ((1 - count / samples) * without).sum()
    pseudo = ratio * value - (ratio - 1) * without
    variance = ((pseudo - mean).square() / (ratio - 1)).mean()
    half = T_95 * math.sqrt(float(variance))
    infinity = float(mean) if biased else None
    return Estimate(value, samples, value - half, value + half, infinity, tuple(left_out))


SPLITS = 16
OWN_LEFT = 0.6
"""What is left of `own` in half_splits_error at twice the images: 0.5 covers 92.7 % at 5,000 fake and 1,000 real images, 0.6
95.4 %, and 94.5 % at 100 and 1,000 fake ones (Gaussians of 16 dimensions, 369 to 500 trials)."""


def half_splits_error(halves: Tensor, own: float = 0.0) -> float:
    """Half width of the 95 % interval of a statistic over n images, from its values on both halves of random splits.

    The halves are independent, so half of the squared difference is an unbiased estimate of the variance at n / 2, and half
    of that estimates the variance at n. Used for nearest-neighbour statistics, whose variance the jackknife doubles.

    Args:
        halves: (splits, 2).
        own: the part of the variance at n / 2 that single images of the fixed set have by themselves. It falls more slowly:
            whether a real image is covered stays uncertain as long as it is at the rim.
    """
    of_halves = float((halves[:, 0] - halves[:, 1]).square().mean()) / 2
    variance = OWN_LEFT * own + max(of_halves - own, 0.0) / 2
    # The splits share images, so the effective number of independent splits is smaller.
    return student_t(round(0.6 * len(halves))) * math.sqrt(variance)


def balanced_groups(sample_ids: Tensor, all_ids: Tensor | None = None) -> Tensor:
    """Jackknife group of each image, from the ids alone: (n,) int64 in [0, GROUPS); group sizes differ by at most 1.

    Ids are scrambled first, because neighbours are similar in some sets (five captions of one photograph).

    Args:
        sample_ids: (n,), int64.
        all_ids: ids of all ranks, without duplicates; None if `sample_ids` holds all of them.
    """
    keys = _scrambled(sample_ids)
    everyone = keys if all_ids is None else _scrambled(all_ids)
    return torch.searchsorted(everyone.sort().values, keys) % GROUPS


def _scrambled(ids: Tensor) -> Tensor:
    """A fixed permutation of 62-bit integers (multiply by an odd number, fold the high bits down)."""
    mask = (1 << 62) - 1
    keys = ids.long()
    for odd in (-7046029254386353131, -4658895280553007687):
        keys = (keys * odd) & mask
        keys = keys ^ (keys >> 31)
    return keys
