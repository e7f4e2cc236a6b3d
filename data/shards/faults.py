"""Bad samples: replaced one by one, written to a file, and counted; too many stop the run.

All reading processes of all ranks append to the same file and count what stands in it, so the budget is that
of the whole run, also over restarts. Whether a sample is bad is decided each time by reading it, never by the
file: what a position holds depends on the shards alone.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from sdxs_lightning.core.errors import UserError


@dataclass(frozen=True)
class Faults:
    """Go on in spite of bad samples, within a budget."""

    budget: int = 100
    """Bad samples (and broken shards) that are replaced; one more stops the run."""
    quarantine: str = "quarantine.jsonl"
    """File with one JSON object a line: shard, key, reason. On a file system that all nodes share."""

    def __post_init__(self) -> None:
        if self.budget < 0:
            raise ValueError(
                f"data.faults.budget is {self.budget}, but it is a number of samples: 0 or more."
            )


class TooManyFaultsError(UserError):
    """More bad samples than the budget allows."""


class UnreadableBatch:
    """What a worker sends in place of a batch, for the main process to raise: without the worker's traceback around it."""

    def __init__(self, error: Exception) -> None:
        self.error = error


class Quarantine:
    """The file of bad samples.

    Args:
        faults: budget and path.
    """

    def __init__(self, faults: Faults) -> None:
        self.budget, self.path = faults.budget, Path(faults.quarantine)
        self._known: set[tuple[str, str]] = set()
        self._read_bytes = 0
        self._last = ""

    def record(self, shard: str, key: str, reason: str) -> None:
        """Write a fault down, unless it is there.

        Raises:
            TooManyFaultsError: if there are more than the budget allows now.
        """
        self._read_new()
        if (shard, key) in self._known:
            return
        line = json.dumps({"shard": shard, "key": key, "reason": reason}, ensure_ascii=False) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # One write to a file opened for appending: lines of several processes do not mix.
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.encode("utf-8", "surrogateescape"))
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
        whole = new[: new.rfind(b"\n") + 1]
        self._read_bytes += len(whole)
        for line in whole.splitlines():
            try:
                entry = json.loads(line)
                self._known.add((entry["shard"], entry["key"]))
            except (ValueError, KeyError, TypeError):
                continue  # cut off by a crash
