"""Mean and covariance of features: float64 accumulation, reduction over ranks, npz files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from evaluation.metrics.collectives import global_rank

MOST_COUNTED = 10**12
"""Images of statistics that are believed: more would be a number of another kind."""


@dataclass(frozen=True)
class FeatureStatistics:
    """Mean and covariance of the features of a set of images."""

    mean: Tensor
    """(d,), float64."""
    covariance: Tensor
    """(d, d), float64."""
    count: int
    """Number of images; FID's bias depends on it, so compare at equal counts only. 0 if unknown."""
    origin: Mapping[str, Any] = field(default_factory=dict)
    """Images and network that were measured; compared before the statistics are used."""
    root: Tensor | None = None
    """(d, n) with root @ root.T = covariance, for n <= d if the features are available; makes the distance exact."""

    @classmethod
    def from_features(cls, features: Tensor, origin: Mapping[str, Any] | None = None) -> FeatureStatistics:
        """Fit to features (n, d).

        Raises:
            ValueError: for features that are not finite.
        """
        features = features.double()
        if not torch.isfinite(features).all():
            raise ValueError(
                "features to take statistics of are not finite; check the feature network's weights"
            )
        count, dimensions = features.shape
        mean = features.mean(0)
        covariance = torch.cov(features.T).reshape(dimensions, dimensions)
        root = None
        if 2 <= count <= dimensions:
            root = ((features - mean) / (count - 1) ** 0.5).T
        return cls(mean, covariance, count, origin or {}, root)

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
        """Read a file written by `save`, or an npz of clean-fid or pytorch-fid (only `mu` and `sigma`).

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it has no statistics, or if its origin differs from the given one.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"no reference statistics at {path}; write them with `python -m evaluation.reference`"
            )
        mean, covariance, count, stored = _read(Path(path))
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


def _read(path: Path) -> tuple[Tensor, Tensor, int, dict[str, Any]]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            mean, covariance = archive["mu"], archive["sigma"]
            if mean.dtype.kind not in "fiu" or covariance.dtype.kind not in "fiu":
                raise ValueError(
                    f"'mu' is {mean.dtype} and 'sigma' {covariance.dtype}, which are not real numbers"
                )
            mean, covariance = mean.astype(np.float64), covariance.astype(np.float64)
            count = archive["n"] if "n" in archive else np.int64(0)
            stored = json.loads(str(archive["protocol"])) if "protocol" in archive else {}
    except Exception as error:  # damaged archives raise many types: BadZipFile, EOFError, zlib.error, ...
        raise ValueError(
            f"{path} holds no statistics of features (npz with 'mu' and 'sigma'): {error}"
        ) from error
    d = mean.shape[0] if mean.ndim == 1 else -1
    # Of values of 1e200 the squares, and so every distance, are infinite.
    with np.errstate(over="ignore", invalid="ignore"):
        finite = d > 0 and np.isfinite(mean @ mean) and np.isfinite(np.square(covariance).sum())
    if covariance.shape != (d, d) or not finite:
        raise ValueError(
            f"{path}: 'mu' {mean.shape} and 'sigma' {covariance.shape} are no mean (d,) and covariance (d, d) of finite numbers"
        )
    if (
        count.shape != ()
        or count.dtype.kind not in "iu"
        or int(count) < 0
        or int(count) == 1
        or int(count) > MOST_COUNTED
        or not isinstance(stored, dict)
    ):
        raise ValueError(
            f"{path}: 'n' is {count.tolist()}, but statistics are of 2 to {MOST_COUNTED:,} images, and 'protocol' has to be a "
            "JSON object"
        )
    _check_covariance(covariance, path)
    _check_rank(covariance, int(count), path)
    return torch.from_numpy(mean), torch.from_numpy(covariance), int(count), stored


def _check_covariance(covariance: np.ndarray[Any, Any], path: Path) -> None:
    """Check the covariance: invalid matrices give meaningless distances (with -I, FID was 0).

    Raises:
        ValueError: unless it is symmetric and positive semi-definite, up to the rounding of float32 sums.
    """
    scale = float(np.abs(covariance).max(initial=0.0))
    asymmetry = float(np.abs(covariance - covariance.T).max(initial=0.0))
    if asymmetry > 1e-4 * scale:
        raise ValueError(
            f"{path}: 'sigma' is not symmetric (by up to {asymmetry:.3g}), so that it is no covariance"
        )
    try:
        np.linalg.cholesky(
            (covariance + covariance.T) / 2 + (1e-4 * scale + 1e-300) * np.eye(len(covariance))
        )
    except np.linalg.LinAlgError:
        least = float(np.linalg.eigvalsh((covariance + covariance.T) / 2)[0])
        raise ValueError(
            f"{path}: 'sigma' has the negative eigenvalue {least:.3g}, so that it is no covariance; write the statistics again"
        ) from None


def _check_rank(covariance: np.ndarray[Any, Any], count: int, path: Path) -> None:
    """Check the covariance against the number of images, on which the bias of the distance depends.

    Raises:
        ValueError: if all images are equal, or the covariance is of more images than `count`, where that is known (not 0).
    """
    if not covariance.any():
        raise ValueError(
            f"{path}: 'sigma' is zero, which is of images that are all equal; write the statistics again"
        )
    if not 2 <= count <= len(covariance):
        return
    values = np.linalg.eigvalsh(covariance)[::-1]
    if values[count - 1] > 1e-4 * values[0]:
        raise ValueError(
            f"{path}: 'n' is {count}, and {count} images have a covariance with at most {count - 1} eigenvalues above 0, but "
            "that of the file has more; correct 'n', or write the statistics again"
        )


class Sums(NamedTuple):
    """Sums for mean and covariance; the sums of two sets add up."""

    samples: Tensor
    """Number of samples, int64."""
    total: Tensor
    """(d,), float64."""
    outer: Tensor
    """(d, d), float64."""

    @classmethod
    def of(cls, features: Tensor, dimensions: int, device: torch.device) -> Sums:
        """Sums of features (n, d) on a device; n may be 0."""
        total = torch.zeros(dimensions, dtype=torch.float64, device=device)
        outer = torch.zeros(dimensions, dimensions, dtype=torch.float64, device=device)
        sums = cls(torch.tensor(0, device=device), total, outer)
        sums.add(features)
        return sums

    def add(self, features: Tensor, chunk: int = 4096) -> None:
        """Add features (n, d) in place, in chunks to save memory."""
        for part in features.split(chunk) if len(features) > 0 else ():
            part = part.to(self.outer.device).double()
            self.samples.add_(len(part))
            self.total.add_(part.sum(0))
            self.outer.addmm_(part.T, part)

    def subtract(self, other: Sums) -> None:
        """Subtract the sums of a subset, in place."""
        for own, others in zip(self, other, strict=True):
            own.sub_(others)

    def all_reduce(self, group: Any | None) -> None:
        """Sum over ranks, in place."""
        dist.all_reduce(self.samples, group=group)
        dist.all_reduce(self.total, group=group)
        all_reduce_symmetric(self.outer, group)

    def reduce(self, rank: int, group: Any | None) -> None:
        """Sum over ranks on one rank; the sums of other ranks are invalid afterwards."""
        for each in self:
            dist.reduce(each, dst=global_rank(rank, group), group=group)

    def without(self, other: Sums) -> Sums:
        """Sums without those of a subset."""
        return Sums(self.samples - other.samples, self.total - other.total, self.outer - other.outer)

    def statistics(self) -> FeatureStatistics:
        count = int(self.samples)
        mean = self.total / count
        return FeatureStatistics(mean, (self.outer - count * torch.outer(mean, mean)) / (count - 1), count)


def all_reduce_symmetric(matrix: Tensor, group: Any | None = None, parts: int = 8) -> None:
    """All-reduce a symmetric (d, d) matrix in place, one band of rows of the upper triangle at a time.

    Sends nearly half of the bytes, and limits gloo's copies to one band.
    """
    height = -(-len(matrix) // parts)
    for start in range(0, len(matrix), height):
        end = min(start + height, len(matrix))
        band = matrix[start:end, start:].contiguous()
        dist.all_reduce(band, group=group)
        matrix[start:end, start:] = band
        matrix[end:, start:end] = band[:, end - start :].T
