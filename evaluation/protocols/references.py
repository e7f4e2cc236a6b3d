"""Reference statistics and features on disk, with the settings under which they were measured."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evaluation.compare import setting_differences
from evaluation.metrics.frechet import FeatureStatistics
from evaluation.protocols.image_protocol import Measurement
from evaluation.protocols.names import FRECHET_METRICS
from sdxs_lightning.core.errors import UserError


@dataclass(frozen=True)
class Reference:
    """Statistics or features of the real images for one metric."""

    digest: str
    """Digest of the images; enters the hash."""
    statistics: FeatureStatistics | None = None
    """Statistics for Frechet distances."""
    rows: Tensor | None = None
    """(n, d) features for other metrics."""

    @property
    def count(self) -> int:
        """Number of images; 0 if unknown."""
        return (
            len(self.rows)
            if self.rows is not None
            else 0
            if self.statistics is None
            else self.statistics.count
        )

    def require_dimensions(self, wanted: int | None, metric: str, where: str) -> None:
        """Check the dimension of the features.

        Raises:
            UserError: if it differs from the network's.
        """
        have = self.rows.shape[1] if self.rows is not None else None
        if self.statistics is not None:
            have = len(self.statistics.mean)
        if wanted is not None and have != wanted:
            raise UserError(
                f"'{where}' has {metric} features of {have} dimensions, the network of this protocol {wanted}; both sides "
                "have to come from the same feature network."
            )

    def as_statistics(self) -> FeatureStatistics:
        """The stored statistics, or those of the features."""
        if self.statistics is not None:
            return self.statistics
        assert self.rows is not None
        return FeatureStatistics.from_features(self.rows)


def file_of(path: Path, metric: str) -> Path:
    """File of a metric: the given path for FID, otherwise a file beside it with the metric in its name."""
    return path if metric == "fid" else path.with_name(f"{path.stem}.{metric}.npz")


def origin_of(measurement: Measurement, identity: Mapping[str, str]) -> dict[str, Any]:
    """Settings that a reference file depends on besides the images."""
    return {"network": dict(identity), "steps": list(measurement.reference_steps)}


def write_reference(
    path: Path, measurement: Measurement, identity: Mapping[str, str], rows: Tensor, digest: str
) -> Path:
    """Write the reference file of a metric.

    Args:
        path: file for FID; files of other metrics are written beside it.
        measurement: the metric.
        identity: identity of its network.
        rows: (n, d), features.
        digest: digest of the images.

    Returns:
        Path of the npz, with `mu` and `sigma` as read by clean-fid and pytorch-fid, or `features` for metrics that need them.
    """
    file = file_of(path, measurement.metric)
    origin = origin_of(measurement, identity) | {"reference": digest, "samples": len(rows)}
    if measurement.metric in FRECHET_METRICS:
        replace(FeatureStatistics.from_features(rows), origin=origin).save(file)
    else:
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(file, features=rows.numpy(), protocol=np.str_(json.dumps(origin, sort_keys=True)))
    return file


def read_reference(path: Path, measurement: Measurement, identity: Mapping[str, str]) -> Reference:
    """Read a file of `write_reference`, clean-fid or pytorch-fid.

    Raises:
        UserError: if the file is missing, has no statistics, or was measured with another network or other steps.
    """
    metric, file = measurement.metric, file_of(path, measurement.metric)
    if not file.is_file():
        raise UserError(
            f"{metric} needs the reference file {file}, which is not there; write it with `python -m evaluation.reference "
            f"--metrics {metric}`, or give --reference the images themselves."
        )
    if metric in FRECHET_METRICS:
        try:
            statistics = FeatureStatistics.load(file)
        except (ValueError, OSError) as error:
            raise UserError(str(error)) from error
        stored, rows = dict(statistics.origin), None
    else:
        statistics, (rows, stored) = None, _features(file, metric)
    if not stored:
        return Reference(_digest_of(file), statistics, rows)
    wanted = origin_of(measurement, identity)
    stored.setdefault("network", stored.get("judge"))  # key in older files
    found = {key: stored.get(key) for key in wanted}
    if found != wanted:
        raise UserError(
            f"{file} was measured otherwise than this protocol does ({', '.join(setting_differences(found, wanted))}); measure "
            "the reference again with `python -m evaluation.reference`."
        )
    return Reference(str(stored["reference"]), statistics, rows)


def _features(file: Path, metric: str) -> tuple[Tensor, dict[str, Any]]:
    try:
        with np.load(file, allow_pickle=False) as archive:
            features, stored = archive["features"], json.loads(str(archive["protocol"]))
        if not isinstance(stored, dict):
            raise ValueError("'protocol' is not an object")
        if (
            features.ndim != 2
            or features.dtype.kind != "f"
            or not len(features)
            or not np.isfinite(features).all()
        ):
            raise ValueError(f"'features' {features.shape} {features.dtype} are not (n, d) finite numbers")
    except Exception as error:  # damaged archives raise many exception types
        raise UserError(f"{file} holds no features for {metric} ({error}).") from error
    return torch.from_numpy(features).float(), stored


def _digest_of(file: Path) -> str:
    """Digest of the statistics of another tool, which have no digest of their images."""
    with np.load(file, allow_pickle=False) as archive:
        content = archive["mu"].tobytes() + archive["sigma"].tobytes()
    return f"npz-{hashlib.sha256(content).hexdigest()[:12]}"
