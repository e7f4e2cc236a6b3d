"""Mean and covariance of features: fitted, added up, written to and read from disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class FeatureStatistics:
    """Mean and covariance of the features of a set of images."""

    mean: Tensor
    """(d,), float64."""
    covariance: Tensor
    """(d, d), float64."""
    count: int
    """How many images; FID is biased by it, so numbers are compared at equal counts only. 0: the file does not say."""
    origin: Mapping[str, Any] = field(default_factory=dict)
    """What was measured, and with which network: compared before the statistics are used."""
    root: Tensor | None = None
    """(d, n) with root @ root.T = covariance, where n <= d and the features were at hand: makes the distance exact."""

    @classmethod
    def from_features(cls, features: Tensor, origin: Mapping[str, Any] | None = None) -> FeatureStatistics:
        """Fit to features (n, d).

        Raises:
            ValueError: for features that are not finite.
        """
        features = features.double()
        if not torch.isfinite(features).all():
            raise ValueError(
                "features to take statistics of are not finite; look at the feature network's weights"
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
        """Read what `save` wrote, or an npz of clean-fid or pytorch-fid (`mu`, `sigma` and no more).

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it holds no statistics, or if `origin` is given and the file was measured under another one.
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
            mean, covariance = archive["mu"].astype(np.float64), archive["sigma"].astype(np.float64)
            count = int(archive["n"]) if "n" in archive else 0
            stored = json.loads(str(archive["protocol"])) if "protocol" in archive else {}
    except (KeyError, ValueError, OSError, AttributeError) as error:
        raise ValueError(
            f"{path} holds no statistics of features (npz with `mu` and `sigma`): {error}"
        ) from error
    d = mean.shape[0] if mean.ndim == 1 else -1
    if covariance.shape != (d, d) or not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError(
            f"{path}: `mu` {mean.shape} and `sigma` {covariance.shape} are no mean (d,) and covariance (d, d) of finite numbers"
        )
    return torch.from_numpy(mean), torch.from_numpy(covariance), count, stored
