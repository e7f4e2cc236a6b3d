"""Inception score: how certain a classifier is of each image, and how varied its answers are over all."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from evaluation.metrics.estimates import GROUPS, Estimate, balanced_groups, jackknife
from evaluation.metrics.feature_sets import FeatureSetMetric

SHUFFLE_SEED = 2020


class InceptionScore(FeatureSetMetric):
    """Inception score: exp of the mean of KL(p(y|x) || p(y)), averaged over ten parts of the shuffled images.

    Equals torch-fidelity's `--isc`. It reads no real images, and says nothing of how well images fit captions.

    Args:
        logits: maps (B,3,H,W) uint8 images to (B, classes) float32 logits.
        splits: number of parts.

    Source: Salimans et al., arXiv:1606.03498, section 4.
    """

    least = GROUPS

    def __init__(self, logits: Callable[[Tensor], Tensor], splits: int = 10) -> None:
        super().__init__(logits, torch.zeros(0, 0), ("inception_score",))
        self.splits = splits

    def between(self, fake: Tensor, real: Tensor) -> list[Estimate]:
        """The score with a jackknife interval over groups of images; there is no real side.

        The score of N images is below that of all that the generator makes, by about c / N: not comparable between numbers
        of images.
        """
        logits, count = fake.cpu().double(), len(fake)
        value = inception_score(logits, self.splits)
        if count < 2 * self.splits * GROUPS:
            return [Estimate(value, count)]
        groups = balanced_groups(torch.arange(count))
        left_out = [inception_score(logits[groups != group], self.splits) for group in range(GROUPS)]
        sizes = groups.bincount(minlength=GROUPS).tolist()
        return [jackknife(value, left_out, count, biased=False, sizes=sizes).within(1.0)]


def inception_score(logits: Tensor, splits: int = 10) -> float:
    """Inception score of logits (n, classes), float64, in the order of the images, as torch-fidelity shuffles and splits."""
    count = len(logits)
    order = torch.from_numpy(np.random.RandomState(SHUFFLE_SEED).permutation(count))
    log_p = logits[order].double().log_softmax(1)
    scores = []
    for part in range(splits):
        rows = log_p[part * count // splits : (part + 1) * count // splits]
        marginal = rows.exp().mean(0, keepdim=True)
        scores.append((rows.exp() * (rows - marginal.log())).sum(1).mean().exp())
    return float(torch.stack(scores).mean())
