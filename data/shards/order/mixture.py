"""Weighted mixtures: the source of each position is given by a deterministic schedule.

Random draws would need a stored sequence or a sum over all earlier positions. The schedule computes the source of a position
and the number of earlier positions of that source by a few divisions, and over the first n positions a source is never more
than about two samples away from its share.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import reduce
from math import gcd

import numpy as np

from data.shards.order.sample_order import Int64Array, SampleOrder

_RESOLUTION = 10**6  # weights are fractions of at most this denominator


@dataclass(frozen=True)
class Source:
    """One data set of a mixture."""

    shards: str | list[str]
    """A folder, a glob, a brace pattern, URLs, or a list of these."""
    weight: float = 1.0
    """Samples of this source for each sample of a source of weight 1."""

    def __post_init__(self) -> None:
        if not 0 < self.weight < float("inf"):
            raise ValueError(f"data.sources: the weight of '{self.shards}' is {self.weight}; it is above 0.")


def integer_weights(weights: Sequence[float]) -> list[int]:
    """The smallest integers proportional to the weights, to one part in a million.

    Raises:
        ValueError: for a weight that is too small for this resolution.
    """
    total = sum(weights)
    parts = [round(weight / total * _RESOLUTION) for weight in weights]
    exact = [Fraction(weight).limit_denominator(1000) for weight in weights]
    if all(float(fraction) == weight for fraction, weight in zip(exact, weights, strict=True)):
        common = reduce(lambda a, b: a * b // gcd(a, b), (fraction.denominator for fraction in exact))
        if sum(integers := [int(fraction * common) for fraction in exact]) <= _RESOLUTION:
            parts = integers
    if min(parts) == 0:
        raise ValueError(
            f"data.sources have the weights {list(weights)}; the smallest is below a millionth of their sum."
        )
    return parts


class Schedule:
    """Distributes the numbers 0, 1, 2, ... over choices in proportion to their weights.

    The first choice takes each number n where floor(n w / W + 1/2) increases, the second does so among the remaining
    numbers, and so on, so the count of a choice among the first n numbers has a closed form. Of each W numbers the
    first choice gets exactly its weight, the others very nearly.
    """

    def __init__(self, weights: Sequence[int]) -> None:
        """Store the weights, positive integers."""
        divisor = reduce(gcd, weights)
        self.weights = [weight // divisor for weight in weights]

    def at(self, numbers: Sequence[int] | Int64Array) -> tuple[Int64Array, Int64Array]:
        """The choice of each number, and the count of smaller numbers with the same choice.

        Args:
            numbers: (n,), non-negative; times a weight below 2^62.

        Returns:
            (n,) and (n,), int64.
        """
        left = np.array(numbers, dtype=np.int64)
        choices, counts = np.full_like(left, -1), np.zeros_like(left)
        total = sum(self.weights)
        for choice, weight in enumerate(self.weights):
            before = (left * weight + total // 2) // total
            taken = (choices < 0) & (((left + 1) * weight + total // 2) // total > before)
            choices[taken], counts[taken] = choice, before[taken]
            left = left - before
            total -= weight
        return choices, counts


class MixedOrder:
    """Maps positions to samples of several sources; each source has its own epochs."""

    def __init__(self, orders: Sequence[SampleOrder], weights: Sequence[int], offsets: Sequence[int]) -> None:
        """Store the parts.

        Args:
            orders: order of each source.
            weights: integer weight of each source.
            offsets: number of the first sample of each source among all samples.
        """
        self.orders, self.schedule, self.offsets = tuple(orders), Schedule(weights), tuple(offsets)
        self.seed = orders[0].seed

    def __len__(self) -> int:
        """Positions in an epoch: the total number of samples, although sources may be visited more or less than once."""
        return sum(len(order) for order in self.orders)

    @property
    def version(self) -> int:
        return max(order.version for order in self.orders)

    def replacement(self, sample: int, attempt: int) -> int:
        """A replacement from the same source."""
        source = int(np.searchsorted(self.offsets, sample, side="right")) - 1
        return self.offsets[source] + self.orders[source].replacement(sample - self.offsets[source], attempt)

    def samples_at(self, positions: Sequence[int] | Int64Array) -> Int64Array:
        """Sample numbers at the given positions."""
        choices, counts = self.schedule.at(positions)
        samples = np.empty_like(choices)
        for source in set(choices.tolist()):
            here = choices == source
            samples[here] = self.offsets[source] + self.orders[source].samples_at(counts[here])
        return samples
