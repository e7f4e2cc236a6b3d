"""Bad samples: replaced, recorded in a file and counted; too many stop the run.

All workers of all ranks append to the same file and count its entries, so the budget applies to the complete run, also across
restarts. Whether a sample is bad is always decided by reading it, never by the file: the sample at a position depends on the
shards alone.
"""

import contextlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sdxs_lightning.core.errors import UserError


@dataclass(frozen=True)
class Faults:
    """Tolerance for bad samples."""

    budget: int = 100
    """Bad samples (and broken shards) that are replaced; one more stops the run."""
    quarantine: str = "quarantine.jsonl"
    """File with one JSON object per line: shard, key, reason. A relative path is in the run's folder
    (trainer.default_root_dir), which all nodes share. A run that does not resume sets the file of an earlier run aside."""

    def __post_init__(self) -> None:
        if self.budget < 0:
            raise ValueError(
                f"data.faults.budget is {self.budget}, but it must be a number of samples: 0 or more."
            )


class TooManyFaultsError(UserError):
    """Raised for more bad samples than the budget allows."""


class UnreadableBatch:
    """Returned by a worker in place of a batch; the main process raises it without the worker's traceback."""

    def __init__(self, error: Exception) -> None:
        self.error = error


class Quarantine:
    """The file of bad samples.

    Args:
        faults: budget and path.
        folder: folder of the run, for a relative path.
        shards: shards of the run; entries about other shards are not counted. None counts all.
    """

    def __init__(self, faults: Faults, folder: str | Path = ".", shards: Iterable[str] | None = None) -> None:
        self.budget, self.path = faults.budget, Path(folder) / Path(faults.quarantine).expanduser()
        self._shards = None if shards is None else frozenset(shards)
        self._known: set[tuple[str, str]] = set()
        self._read_bytes = 0

    def set_aside(self) -> None:
        """Rename the file of an earlier run to the first free name."""
        for number in range(1, 1 << 16):
            target = self.path.with_name(f"{self.path.stem}.{number}{self.path.suffix}")
            if not target.exists():
                with contextlib.suppress(FileNotFoundError):  # no such file, or another node was first
                    os.rename(self.path, target)
                return

    def record(self, shard: str, key: str, reason: str) -> None:
        """Record a fault, unless it is already recorded.

        Raises:
            TooManyFaultsError: if there are more now than the budget allows.
        """
        self._read_new()
        if (shard, key) in self._known:
            return
        line = json.dumps({"shard": shard, "key": key, "reason": reason}, ensure_ascii=False) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # A single write with O_APPEND, so that lines of several processes do not interleave.
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.encode("utf-8", "backslashreplace"))
        finally:
            os.close(descriptor)
        self._read_new()
        if len(self._known) > self.budget:
            raise TooManyFaultsError(
                f"{len(self._known)} samples or shards cannot be read, more than data.faults.budget {self.budget}; the last: "
                f"{reason} All are in {self.path}: repair or remove those shards, or raise the budget."
            )

    def _read_new(self) -> None:
        try:
            with open(self.path, "rb") as file:
                file.seek(self._read_bytes)
                new = file.read()
        except FileNotFoundError:
            return
        complete = new[: new.rfind(b"\n") + 1]
        self._read_bytes += len(complete)
        for line in complete.splitlines():
            try:
                entry = json.loads(line)
                if self._shards is None or entry["shard"] in self._shards:
                    self._known.add((entry["shard"], entry["key"]))
            except (ValueError, KeyError, TypeError):
                continue  # truncated by a crash
