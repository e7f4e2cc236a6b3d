"""Frechet distance between two Gaussians fitted to image features, as a formula, as statistics on disk and as a Metric.

    d^2 = |mu_1 - mu_2|^2 + tr S_1 + tr S_2 - 2 tr (S_1^(1/2) S_2 S_1^(1/2))^(1/2)

mu, S: mean and covariance (n - 1 in the denominator) of the features. Source: Heusel et al., arXiv:1706.08500, eq. 6;
Dowson and Landau (1982).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evaluation.summed import SummedMetric


def frechet_distance(mean_1: Tensor, covariance_1: Tensor, mean_2: Tensor, covariance_2: Tensor) -> float:
    """The squared Frechet distance that is called FID when the features are an Inception network's.

    With S_i = B_i B_i^T, the trace of the matrix root is the sum of the singular values of B_1^T B_2. That is real by
    construction, and it does not take the square root of rounding errors: with fewer samples than dimensions (n = 500,
    d = 1024) it is exact to 4e-15, where the usual root of the eigenvalues of the product is off by 3e-8.

    Args:
        mean_1: (d,), any float, used in float64.
        covariance_1: (d, d), symmetric, positive semi-definite.
        mean_2: (d,).
        covariance_2: (d, d).

    Returns:
        The distance, not below zero.

    Raises:
        ValueError: if the two sides have different dimensions.
    """
    if mean_1.shape != mean_2.shape or covariance_1.shape != covariance_2.shape:
        raise ValueError(
            f"Frechet distance of features of {tuple(mean_1.shape)} and {tuple(mean_2.shape)} dimensions; both sides have "
            "to come from the same feature network"
        )
    mean_1, mean_2 = mean_1.double(), mean_2.double()
    factor_1, factor_2 = _factor(covariance_1.double()), _factor(covariance_2.double())
    cross = torch.linalg.svdvals(factor_1.T @ factor_2).sum()
    spread = covariance_1.double().trace() + covariance_2.double().trace() - 2 * cross
    return float(((mean_1 - mean_2).square().sum() + spread).clamp_min(0))


def _factor(covariance: Tensor) -> Tensor:
    """B (d, rank) with B B^T = covariance; eigenvalues that are rounding noise are dropped, as in matrix_rank."""
    values, vectors = torch.linalg.eigh(covariance)
    noise = len(values) * torch.finfo(values.dtype).eps * values[-1].clamp_min(0)
    kept = values > noise
    factor: Tensor = vectors[:, kept] * values[kept].sqrt()
    return factor


@dataclass(frozen=True)
class FeatureStatistics:
    """Mean and covariance of the features of a set of images."""

    mean: Tensor
    """(d,), float64."""
    covariance: Tensor
    """(d, d), float64."""
    count: int
    """How many images; FID is biased by it, so numbers are compared at equal counts only."""
    origin: Mapping[str, Any] = field(default_factory=dict)
    """What was measured, and with which network: compared before the statistics are used."""

    @classmethod
    def from_features(cls, features: Tensor, origin: Mapping[str, Any] | None = None) -> FeatureStatistics:
        """Fit to features (n, d)."""
        features = features.double()
        return cls(
            features.mean(0),
            torch.cov(features.T).reshape(2 * features.shape[1:]),
            len(features),
            origin or {},
        )

    def save(self, path: str | Path) -> None:
        """Write an npz with `mu`, `sigma` (float64), which clean-fid and pytorch-fid read, and `n`, `protocol` (JSON)."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        np.savez(
            path,
            mu=self.mean.cpu().numpy(),
            sigma=self.covariance.cpu().numpy(),
            n=np.int64(self.count),
            protocol=np.str_(json.dumps(dict(self.origin), sort_keys=True)),
        )

    @classmethod
    def load(cls, path: str | Path, origin: Mapping[str, Any] | None = None) -> FeatureStatistics:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if `origin` is given and the file was measured under another one.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"no reference statistics at {path}; write them with `python -m evaluation.reference`"
            )
        with np.load(path, allow_pickle=False) as archive:
            mean, covariance = torch.from_numpy(archive["mu"]), torch.from_numpy(archive["sigma"])
            stored = json.loads(str(archive["protocol"]))
            count = int(archive["n"])
        if origin is not None and stored != dict(origin):
            keys = sorted(set(stored) | set(origin))
            differences = [
                f"{key}: {stored.get(key)!r} != {origin.get(key)!r}"
                for key in keys
                if stored.get(key) != origin.get(key)
            ]
            raise ValueError(
                f"{path} was measured under another protocol ({'; '.join(differences)}); "
                "measure it again with `python -m evaluation.reference`"
            )
        return cls(mean, covariance, count, stored)


class FrechetDistance(SummedMetric):
    """FID of the images that it is updated with, against fixed statistics or against images given with `real=True`.

    Keeps n, the sum and the sum of outer products in float64 (float32 sums lose the fourth digit). The features come in
    float32 from `features`, which is called outside autocast and is not a submodule: no checkpoint holds its weights.

    Args:
        features: (B,3,H,W) uint8 images to (B, d) float32 features.
        dimensions: d.
        reference: the real side; None to give the real images with `update(..., real=True)`.
        reset_real_features: whether `reset` forgets the real images too.
    """

    higher_is_better = False
    fake_count: Tensor
    fake_sum: Tensor
    fake_outer: Tensor
    real_count: Tensor
    real_sum: Tensor
    real_outer: Tensor

    def __init__(
        self,
        features: Callable[[Tensor], Tensor],
        dimensions: int,
        reference: FeatureStatistics | None = None,
        reset_real_features: bool = True,
    ) -> None:
        super().__init__()
        self.features, self.dimensions = features, dimensions
        self.reference, self.reset_real_features = reference, reset_real_features
        for side in ("fake", "real") if reference is None else ("fake",):
            self.add_sum(f"{side}_count", dtype=torch.int64)
            self.add_sum(f"{side}_sum", (dimensions,))
            self.add_sum(f"{side}_outer", (dimensions, dimensions))

    def update(self, images_uint8: Tensor, real: bool = False) -> None:
        """Add images.

        Args:
            images_uint8: (B,3,H,W), uint8; B may be 0.
            real: which side they belong to.

        Raises:
            ValueError: for real images when the reference is fixed.
        """
        if real and self.reference is not None:
            raise ValueError(
                "real images given to a FrechetDistance that was built with reference statistics"
            )
        if len(images_uint8) == 0:
            return
        features = self.features(images_uint8).double()
        side = "real" if real else "fake"
        getattr(self, f"{side}_count").add_(len(features))
        getattr(self, f"{side}_sum").add_(features.sum(0))
        getattr(self, f"{side}_outer").add_(features.T @ features)

    def statistics(self, real: bool = False) -> FeatureStatistics:
        """Mean and covariance of one side, from the sums of this rank (of all ranks inside `compute`)."""
        if real and self.reference is not None:
            return self.reference
        side = "real" if real else "fake"
        count = int(getattr(self, f"{side}_count"))
        if count < 2:
            raise ValueError(f"FID needs at least 2 {side} images, got {count}")
        mean = getattr(self, f"{side}_sum") / count
        covariance = (getattr(self, f"{side}_outer") - count * torch.outer(mean, mean)) / (count - 1)
        return FeatureStatistics(mean, covariance, count)

    def compute(self) -> Tensor:
        """The distance as a float64 scalar; collective under torch.distributed."""
        fake, real = self.statistics(), self.statistics(real=True)
        device = fake.mean.device
        distance = frechet_distance(
            fake.mean, fake.covariance, real.mean.to(device), real.covariance.to(device)
        )
        return torch.tensor(distance, dtype=torch.float64, device=device)

    def reset(self) -> None:
        """Forget the images; with `reset_real_features=False` the real ones stay."""
        if self.reference is not None or self.reset_real_features:
            return super().reset()
        kept = {name: getattr(self, name) for name in ("real_count", "real_sum", "real_outer")}
        super().reset()
        for name, value in kept.items():
            setattr(self, name, value)
        return None
