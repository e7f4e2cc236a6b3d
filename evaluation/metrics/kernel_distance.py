"""Kernel distances: KID (polynomial, unbiased) and CMMD (Gaussian, biased), both a squared maximum mean discrepancy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from evaluation.metrics.estimates import GROUPS, Estimate, balanced_groups, jackknife, student_t
from evaluation.metrics.feature_sets import FeatureSetMetric


class KernelDistance(FeatureSetMetric):
    """KID: mean over random subsets of the unbiased squared MMD with the kernel (x . y / d + 1)^3.

    Unbiased: the expectation does not depend on the number of images, and equal distributions give values around 0, also
    negative ones. The subsets are drawn with numpy's RandomState as in torch-fidelity; equal features in equal order
    give its value.

    Args:
        features: as in FeatureSetMetric.
        reference: as in FeatureSetMetric.
        subsets: number of subsets.
        subset_size: images of each side in a subset.
        seed: seed of the subsets.
        name: name of the metric.

    Source: Binkowski et al., arXiv:1801.01401.
    """

    higher_is_better = False

    def __init__(
        self,
        features: Callable[[Tensor], Tensor],
        reference: Tensor | None = None,
        subsets: int = 100,
        subset_size: int = 1000,
        seed: int = 2020,
        name: str = "kid",
    ) -> None:
        super().__init__(features, reference, (name,))
        self.subsets, self.subset_size, self.seed = subsets, subset_size, seed
        self.least = subset_size

    def between(self, fake: Tensor, real: Tensor) -> list[Estimate]:
        """The mean over the subsets, with an interval from the infinitesimal jackknife.

        The interval uses the influence of each fake image on the mean, so it holds for overlapping subsets as well as for a
        subset of all images.
        """
        draws = np.random.RandomState(self.seed)
        count, size = len(fake), self.subset_size
        found = []
        influence, uses = fake.new_zeros(2, count, dtype=torch.float64)
        for _ in range(self.subsets):
            rows = [torch.from_numpy(draws.choice(len(side), size, replace=False)) for side in (fake, real)]
            x, y = (side[chosen].double() for side, chosen in zip((fake, real), rows, strict=True))
            xx, xy = polynomial(x, x), polynomial(x, y)
            found.append(unbiased_mmd(xx, xy, polynomial(y, y)))
            own = rows[0].to(fake.device)
            influence[own] += 2 * ((xx.sum(1) - xx.diagonal()) / (size - 1) - xy.mean(1))
            uses[own] += 1
        mean = float(torch.stack(found).mean())
        weights = uses / (self.subsets * size)
        each = influence / uses.clamp_min(1)
        spread = (weights * (each - (weights * each).sum())).square().sum() * count / (count - 1)
        half = student_t(count - 1) * float(spread) ** 0.5
        return [Estimate(mean, count, mean - half, mean + half, None, _left_out(mean, weights, each))]


def _left_out(mean: float, weights: Tensor, each: Tensor) -> tuple[float, ...] | None:
    """The mean without each group of images, to first order in their influences `each` (n,), used with `weights` (n,)."""
    count = len(each)
    if count < 2 * GROUPS:
        return None
    groups = balanced_groups(torch.arange(count)).to(each.device)
    parts = weights.new_zeros(GROUPS).index_add_(0, groups, weights * (each - (weights * each).sum()))
    sizes = groups.bincount(minlength=GROUPS)
    return tuple((mean - parts * count / (count - sizes)).tolist())


def polynomial(x: Tensor, y: Tensor) -> Tensor:
    """KID's kernel matrix (n, m) of rows (n, d) and (m, d)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def unbiased_mmd(kernel_xx: Tensor, kernel_xy: Tensor, kernel_yy: Tensor) -> Tensor:
    """Squared MMD without the diagonals of the within-set kernels.

    Source: Gretton et al., JMLR 13 (2012), eq. 3.
    """
    within = [
        (kernel.sum() - kernel.trace()) / (len(kernel) * (len(kernel) - 1))
        for kernel in (kernel_xx, kernel_yy)
    ]
    return within[0] + within[1] - 2 * kernel_xy.mean()


class MaximumMeanDiscrepancy(FeatureSetMetric):
    """CMMD: squared MMD with a Gaussian kernel, diagonals included, times 1000; on L2-normalised CLIP features.

    Args:
        features: as in FeatureSetMetric; the paper's are ClipImageFeatures of ViT-L/14 at 336 pixels.
        reference: as in FeatureSetMetric.
        sigma: bandwidth of the kernel exp(-|x - y|^2 / (2 sigma^2)).
        scale: factor of the result, for readability.
        name: name of the metric.

    Source: Jayasumana et al., arXiv:2401.09603, and Gretton et al., JMLR 13 (2012), eq. 5.
    """

    higher_is_better = False

    def __init__(
        self,
        features: Callable[[Tensor], Tensor],
        reference: Tensor | None = None,
        sigma: float = 10.0,
        scale: float = 1000.0,
        name: str = "cmmd",
    ) -> None:
        super().__init__(features, reference, (name,))
        self.sigma, self.scale = sigma, scale

    def between(self, fake: Tensor, real: Tensor) -> list[Estimate]:
        """The distance, with a jackknife interval over ten groups of fake images."""
        fake, real = fake.double(), real.double()
        groups = torch.arange(len(fake), device=fake.device) % GROUPS
        member = torch.nn.functional.one_hot(groups, GROUPS).double()
        # Kernel sums between groups: leaving one group out needs no second pass.
        xx = member.T @ self._summed(fake, fake, member)
        xy = member.T @ self._summed(fake, real, real.new_ones(len(real), 1))
        yy = self._summed(real, real, real.new_ones(len(real), 1)).sum() / len(real) ** 2
        sizes = member.sum(0)

        def value(kept: Tensor) -> float:
            count = (sizes * kept).sum()
            within, across = kept @ xx @ kept / count**2, (kept @ xy).sum() / (count * len(real))
            return float(self.scale * (within + yy - 2 * across))

        everything = torch.ones_like(sizes)
        if len(fake) < 2 * GROUPS:
            return [Estimate(value(everything), len(fake))]
        left_out = [value(everything - one) for one in torch.eye(GROUPS, device=fake.device).double()]
        found = jackknife(value(everything), left_out, len(fake), sizes=[int(size) for size in sizes])
        return [found.within(0.0)]

    def _summed(self, x: Tensor, y: Tensor, weights: Tensor, chunk: int = 2048) -> Tensor:
        """kernel(x, y) @ weights: (n, d), (m, d), (m, k) to (n, k), in chunks to save memory."""
        squares = y.square().sum(1)
        parts = []
        for rows in x.split(chunk):
            distances = rows.square().sum(1, keepdim=True) + squares - 2 * rows @ y.T
            parts.append(torch.exp(-distances.clamp_min(0) / (2 * self.sigma**2)) @ weights)
        return torch.cat(parts)
