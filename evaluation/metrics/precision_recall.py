"""Precision and recall of a generator: do its images lie among the real ones, and do they cover them?"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from evaluation.metrics.estimates import Estimate, mean_estimate
from evaluation.metrics.feature_sets import FeatureSetMetric


class PrecisionRecall(FeatureSetMetric):
    """Improved precision and recall, on balls that reach to each image's k-th neighbour of its own set.

    Precision: share of fake images inside the ball of a real one. Recall: share of real images inside the ball of a fake
    one. Both fall with the number of images of the other set, so they are compared at equal counts.

    Args:
        features: as in FeatureSetMetric.
        reference: likewise.
        neighbours: k.

    Source: Kynkaanniemi et al., arXiv:1904.06991.
    """

    higher_is_better = True

    def __init__(
        self, features: Callable[[Tensor], Tensor], reference: Tensor | None = None, neighbours: int = 3
    ) -> None:
        super().__init__(features, reference, ("precision", "recall"))
        self.neighbours = neighbours
        self.least = neighbours + 1

    @property
    def title(self) -> str:
        """For messages."""
        return "precision and recall"

    def between(self, fake: Tensor, real: Tensor) -> list[Estimate]:
        """See FeatureSetMetric; the intervals take the balls as given."""
        precision = mean_estimate(inside(fake, real, radii(real, self.neighbours)))
        recall = mean_estimate(inside(real, fake, radii(fake, self.neighbours)))
        return [precision, recall]


def radii(features: Tensor, neighbours: int, chunk: int = 4096) -> Tensor:
    """Distance of each row (n, d) to its k-th neighbour among the others: (n,)."""
    # The nearest is the row itself.
    return torch.cat(
        [torch.cdist(rows, features).kthvalue(neighbours + 1).values for rows in features.split(chunk)]
    )


def inside(features: Tensor, centres: Tensor, reach: Tensor, chunk: int = 4096) -> Tensor:
    """1 for each row (n, d) that is within reach (m,) of a centre (m, d), 0 for others: (n,), float32."""
    found = [(torch.cdist(rows, centres) <= reach).any(dim=1) for rows in features.split(chunk)]
    return torch.cat(found).float()
