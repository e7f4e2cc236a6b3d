"""Improved precision and recall: shares of fake images near real ones, and of real images near fake ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from evaluation.metrics.estimates import SPLITS, Estimate, half_splits_error, share_estimate
from evaluation.metrics.feature_sets import FeatureSetMetric


class PrecisionRecall(FeatureSetMetric):
    """Improved precision and recall, on balls that reach to each image's k-th nearest neighbour in its own set.

    Precision: share of fake images inside the ball of a real one. Recall: share of real images inside the ball of a fake
    one. Both decrease with the number of images of the other set, so compare them at equal counts only.

    Args:
        features: as in FeatureSetMetric.
        reference: as in FeatureSetMetric.
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
        return "precision and recall"

    def between(self, fake: Tensor, real: Tensor) -> list[Estimate]:
        """Precision and recall; both intervals refer to other fake images against the same real ones."""
        hits = inside(fake, real, radii(real, self.neighbours)).cpu()
        precision = share_estimate(hits, torch.arange(len(fake)))
        share = inside(real, fake, radii(fake, self.neighbours)).mean()
        recall = Estimate(float(share), len(fake))
        if len(fake) // 2 > self.neighbours:
            half = half_splits_error(*_recalls_of_halves(fake, real, self.neighbours))
            recall = replace(recall, low=max(recall.value - half, 0.0), high=min(recall.value + half, 1.0))
        return [precision, recall]


def radii(features: Tensor, neighbours: int, chunk: int = 4096) -> Tensor:
    """Distance of each row (n, d) to its k-th nearest neighbour among the others: (n,)."""
    # The nearest is the row itself.
    return torch.cat(
        [torch.cdist(rows, features).kthvalue(neighbours + 1).values for rows in features.split(chunk)]
    )


def inside(features: Tensor, centres: Tensor, reach: Tensor, chunk: int = 4096) -> Tensor:
    """1 for each row (n, d) within reach (m,) of a centre (m, d), 0 for others: (n,), float32."""
    found = [(torch.cdist(rows, centres) <= reach).any(dim=1) for rows in features.split(chunk)]
    return torch.cat(found).float()


def _recalls_of_halves(
    fake: Tensor, real: Tensor, neighbours: int, chunk: int = 1024
) -> tuple[Tensor, float]:
    """Recall of both halves of SPLITS random splits of the fake images; each distance is computed once.

    Returns:
        The recalls, (SPLITS, 2), and the part of their variance that single real images have: those that one half covers and
        the other does not.
    """
    draws = torch.Generator().manual_seed(0)
    orders = [torch.randperm(len(fake), generator=draws) for _ in range(SPLITS)]
    kept = torch.zeros(2 * SPLITS, len(fake), dtype=torch.bool)
    for split, order in enumerate(orders):
        first, second = order.split(len(fake) // 2)[:2]
        kept[2 * split, first] = True
        kept[2 * split + 1, second] = True
    kept = kept.to(fake.device)
    reach = torch.cat([_radii_among(rows, fake, kept, neighbours) for rows in fake.split(chunk)], dim=1)
    reach[~kept] = -1  # empty balls for images of the other half
    hits = torch.zeros(SPLITS, 2, dtype=torch.float64, device=fake.device)
    differing = torch.zeros((), dtype=torch.float64, device=fake.device)
    for rows in real.split(chunk):
        distances = torch.cdist(rows, fake)
        covered = torch.stack([(distances <= row).any(dim=1) for row in reach]).reshape(SPLITS, 2, -1)
        hits += covered.sum(dim=2)
        differing += (covered[:, 0] != covered[:, 1]).sum()
    own = float(differing) / SPLITS / 2 / len(real) ** 2
    return (hits / len(real)).cpu(), own


def _radii_among(rows: Tensor, features: Tensor, kept: Tensor, neighbours: int, nearest: int = 64) -> Tensor:
    """Distance of rows (n, d) of the features to their k-th nearest neighbour within each subset (s, m) of them: (s, n).

    Only valid for rows in the subset, whose nearest neighbour is the row itself. The nearest rows are found once; where too
    few of them are in a subset, the k-th neighbour is searched among all rows.
    """
    distances = torch.cdist(rows, features)
    near, index = distances.topk(min(nearest, len(features)), largest=False)
    found = []
    for subset in kept:
        rank = subset[index].cumsum(dim=1)
        radius = near.gather(1, (rank > neighbours).double().argmax(dim=1)[:, None]).squeeze(1)
        few = rank[:, -1] <= neighbours
        if bool(few.any()):
            rest = distances[few].masked_fill(~subset, torch.inf)
            radius[few] = rest.kthvalue(neighbours + 1).values
        found.append(radius)
    return torch.stack(found)
