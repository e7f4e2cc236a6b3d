"""Network outputs on disk, one file per batch, so that an interrupted evaluation can resume."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class MeasuredBatch(NamedTuple):
    """Rows and image statistics of a batch."""

    rows: Tensor
    """(B, k), network output."""
    sizes: NDArray[np.int64]
    """(B, 2), width and height of each image before any step."""
    constant: NDArray[np.bool_]
    """(B,), whether all pixels of an image are equal (black images from a safety checker or an overflow)."""


@dataclass(frozen=True)
class RowStore:
    """Rows of one network over one set of images: a folder with a file per batch.

    Files are written atomically. The folder name contains a hash of everything that the rows depend on, so that rows of other
    settings are never reused.
    """

    folder: Path
    count: int
    """Number of images."""
    batch_size: int
    """Batch k has the images k * batch_size to (k + 1) * batch_size - 1, in every process."""

    @classmethod
    def at(cls, root: Path, what: str, settings: Mapping[str, Any], count: int, batch_size: int) -> RowStore:
        """The store for these settings.

        Args:
            root: parent folder of all stores.
            what: prefix of the folder name.
            settings: everything that the rows depend on, JSON-serialisable.
            count: number of images.
            batch_size: images per file.
        """
        described = {**settings, "count": count, "batch_size": batch_size}
        digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:12]
        folder = root / f"{what}-{digest}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "settings.json").write_text(json.dumps(described, indent=2) + "\n")
        return cls(folder, count, batch_size)

    @property
    def batches(self) -> int:
        return -(-self.count // self.batch_size)

    def numbers(self, batch: int) -> list[int]:
        """Image numbers of a batch."""
        start = batch * self.batch_size
        return list(range(start, min(start + self.batch_size, self.count)))

    def path(self, batch: int) -> Path:
        return self.folder / f"batch_{batch:06d}.npz"

    def missing(self) -> list[int]:
        """Batches without a file."""
        there = {path.name for path in self.folder.glob("batch_*.npz")}
        return [batch for batch in range(self.batches) if self.path(batch).name not in there]

    def save(self, batch: int, part: MeasuredBatch) -> None:
        """Write a batch atomically."""
        with tempfile.NamedTemporaryFile(dir=self.folder, suffix=".partial", delete=False) as file:
            np.savez(file, rows=part.rows.cpu().numpy(), sizes=part.sizes, constant=part.constant)
        os.replace(file.name, self.path(batch))

    def load(self, batch: int) -> MeasuredBatch:
        """Read a batch.

        Raises:
            ValueError: if the file was not written by `save`.
        """
        path = self.path(batch)
        try:
            with np.load(path, allow_pickle=False) as archive:
                part = MeasuredBatch(torch.from_numpy(archive["rows"]), archive["sizes"], archive["constant"])
        except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} cannot be read ({error}); remove it and run again") from error
        if len(part.rows) != len(self.numbers(batch)):
            raise ValueError(f"{path} holds {len(part.rows)} rows; remove it and run again")
        return part

    def all(self) -> MeasuredBatch:
        """All rows, in image order."""
        parts = [self.load(batch) for batch in range(self.batches)]
        return MeasuredBatch(
            torch.cat([part.rows for part in parts]),
            np.concatenate([part.sizes for part in parts]),
            np.concatenate([part.constant for part in parts]),
        )

    def fail(self, reason: str) -> None:
        """Record that the network failed on these images."""
        self._failed.write_text(reason)

    def failure(self) -> str | None:
        """Reason of a recorded failure, or None."""
        return self._failed.read_text() if self._failed.is_file() else None

    def retry(self) -> None:
        """Clear the failure of an earlier run."""
        self._failed.unlink(missing_ok=True)

    @property
    def _failed(self) -> Path:
        return self.folder / "failed.txt"
