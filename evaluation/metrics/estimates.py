"""A number with what is needed to quote it: how many images, and how far it may be off by chance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

GROUPS = 10
"""Parts that the images are cut into for an interval; each is left out once."""

T_95 = 2.2622
"""Student's t for 95 % and GROUPS - 1 degrees of freedom."""


@dataclass(frozen=True)
class Estimate:
    """One number over a set of images."""

    value: float
    """What the tools that the protocol follows would print."""
    samples: int
    """How many images, duplicates left out."""
    low: float | None = None
    """Lower end of the 95 % interval for drawing other images of the same generator; None where there is none."""
    high: float | None = None
    """Upper end."""
    infinity: float | None = None
    """For distances that are too large by about c / samples: the value with that part taken off."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON; only what is known."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def mean_estimate(values: Tensor) -> Estimate:
    """Mean of per-image values (n,) with its normal 95 % interval (none for a single image)."""
    values = values.double()
    mean, count = float(values.mean()), len(values)
    if count < 2:
        return Estimate(mean, count)
    half = 1.96 * float(values.std()) / math.sqrt(count)
    return Estimate(mean, count, mean - half, mean + half)


def jackknife(value: float, left_out: Sequence[float], samples: int, biased: bool = True) -> Estimate:
    """Interval and bias of a statistic from its values with one group of images left out at a time.

    With g groups, pseudo-value k is g * value - (g - 1) * left_out[k]. Their mean is the value with its bias of order 1/n
    removed: for FID an extrapolation in 1/N from 0.9 N and N, in which every image is used equally often. Their spread gives
    the interval.

    Args:
        value: over all images.
        left_out: without group k, for each k; GROUPS of them.
        samples: images in all.
        biased: whether the statistic is too large by about c / n, so that `infinity` is worth stating.

    Source: Quenouille (1956), Tukey (1958); FID's bias in 1/N: Chong and Forsyth, arXiv:1911.07023.
    """
    groups = len(left_out)
    pseudo = groups * value - (groups - 1) * torch.tensor(left_out, dtype=torch.float64)
    half = T_95 * float(pseudo.std()) / math.sqrt(groups)
    infinity = float(pseudo.mean()) if biased else None
    return Estimate(value, samples, value - half, value + half, infinity)


def group_of(sample_ids: Tensor) -> Tensor:
    """Which of GROUPS an image belongs to, from its id alone: (n,) int64 to (n,) int64 in [0, GROUPS).

    Ids are scrambled first: neighbours are alike in some sets (five captions of one photograph).
    """
    # One multiplication (Knuth's 2^32 / golden ratio) and the high bits: no two ranks can disagree about it.
    scrambled = (sample_ids * 2654435761) & 0xFFFFFFFF
    return (scrambled >> 8) % GROUPS
