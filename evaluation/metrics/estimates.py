"""A number with what is needed to quote it: the number of images, and a 95 % interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
    """One number over a set of images.

    The interval is for other images of the same generator: it covers, in 95 of 100 draws, the mean that the same metric has at
    the same number of images against the same reference. `evaluation.benchmarks.coverage` measures that.
    """

    value: float
    """What the tools that the protocol follows would print."""
    samples: int
    """Number of images without duplicates."""
    low: float | None = None
    """Lower end of the 95 % interval; None where there is none."""
    high: float | None = None
    """Upper end."""
    infinity: float | None = None
    """For distances with a bias of about c / samples: the value without that bias."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON; unknown fields are left out."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    def not_below(self, least: float) -> Estimate:
        """Everything cut off at a bound that the metric cannot cross, be it by rounding."""
        low, high, infinity = (
            None if each is None else max(each, least) for each in (self.low, self.high, self.infinity)
        )
        return Estimate(max(self.value, least), self.samples, low, high, infinity)


def student_t(freedom: int) -> float:
    """Student's t for a two-sided 95 % interval; to four digits from 8 degrees of freedom on.

    Source: Abramowitz and Stegun, 26.7.5.
    """
    z, n = 1.959964, max(freedom, 1)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + terms[0] / n + terms[1] / n**2 + terms[2] / n**3


def mean_estimate(values: Tensor) -> Estimate:
    """Mean of per-image values (n,) with its normal 95 % interval (none for a single image)."""
    values = values.double()
    mean, count = float(values.mean()), len(values)
    if count < 2:
        return Estimate(mean, count)
    half = Z_95 * float(values.std()) / math.sqrt(count)
    return Estimate(mean, count, mean - half, mean + half)


def share_estimate(hits: Tensor) -> Estimate:
    """Share of ones in (n,) zeros and ones, with Wilson's 95 % interval, which has a width also at 0 and 1.

    Source: Wilson, JASA 22 (1927).
    """
    share, count = float(hits.double().mean()), len(hits)
    shrink = 1 + Z_95**2 / count
    centre = (share + Z_95**2 / (2 * count)) / shrink
    half = Z_95 / shrink * math.sqrt(share * (1 - share) / count + Z_95**2 / (4 * count**2))
    return Estimate(share, count, max(centre - half, 0.0), min(centre + half, 1.0))


def jackknife(
    value: float,
    left_out: Sequence[float],
    samples: int,
    biased: bool = True,
    sizes: Sequence[int] | None = None,
) -> Estimate:
    """Interval and bias of a statistic from its values with one group of images left out at a time.

    With h = samples / size of group k, pseudo-value k is h * value - (h - 1) * left_out[k]. For equal groups their mean is the
    value without its bias of order 1/n (for FID an extrapolation in 1/N from 0.9 N and N in which every image is used equally
    often), and their spread gives the interval. Groups of unequal size are weighted as in the delete-m_j jackknife.

    Args:
        value: over all images.
        left_out: without group k, for each k; GROUPS of them.
        samples: images in all.
        biased: whether the statistic is too large by about c / n, so that `infinity` is worth stating.
        sizes: images of each group, none of them 0; None if they are equal.

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
    return Estimate(value, samples, value - half, value + half, float(mean) if biased else None)


SPLITS = 16


def half_splits_error(halves: Tensor) -> float:
    """Half width of the 95 % interval of a statistic over n images, from its values on both halves of random splits.

    The halves are independent, so that half of the squared difference estimates the variance at n / 2 without bias, and half
    of that the variance at n. For statistics of nearest neighbours, of which the jackknife finds twice the variance.

    Args:
        halves: (splits, 2).
    """
    variance = (halves[:, 0] - halves[:, 1]).square().mean() / 4
    # The splits share their images, so that fewer of them than there are count as independent.
    return student_t(round(0.6 * len(halves))) * math.sqrt(float(variance))


def balanced_groups(sample_ids: Tensor, all_ids: Tensor | None = None) -> Tensor:
    """The jackknife group of each image, from the ids alone: (n,) int64 in [0, GROUPS), of sizes that differ by at most 1.

    Ids are scrambled first: neighbours are alike in some sets (five captions of one photograph).

    Args:
        sample_ids: (n,), int64, those whose groups are wanted.
        all_ids: of all ranks; None if `sample_ids` are all. Without duplicates.
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
