"""Writes checkpoints, in a thread of its own if training is to continue meanwhile."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import save as save_shards

from sdxs_lightning.callbacks import checkpoint_folder as folders
from sdxs_lightning.callbacks.counts import Counts
from sdxs_lightning.callbacks.nan_guard import networks_with_bad_weights
from sdxs_lightning.callbacks.ranks import Ranks

META = "meta.pt"
"""What is neither weights nor optimizer state, in a folder of shards; the name that Lightning reads."""


class Snapshot(NamedTuple):
    """A checkpoint to be written."""

    contents: dict[str, Any]
    """Lightning's checkpoint; this rank's part of it if sharded."""
    folder: Path
    """Where it will be once it is complete."""
    counts: Counts
    starts: int
    """How often the run had been started."""
    sharded: bool
    """Whether each rank writes a shard; otherwise rank 0 writes one file."""
    guarded: bool = False
    """Whether nothing is written if a weight is NaN or infinite."""


class CheckpointWriter:
    """Writes one checkpoint at a time: all files, then the manifest, then the final name.

    Ranks that write shards work together over a process group of their own, apart from the training's collectives.

    Args:
        keep: number of complete checkpoints to keep in the folder.
    """

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self.ranks = Ranks()
        self.size = 0
        """Bytes of the last complete checkpoint; on rank 0."""
        self.bad_networks: list[str] = []
        """Those with NaN or infinite weights in the last checkpoint, which for that was not written."""
        self._thread: threading.Thread | None = None
        self._problem: str | None = None
        self._error: BaseException | None = None

    def connect(self) -> None:
        """Creates the process group. A collective of the main threads, before the first checkpoint."""
        self.ranks.wait()

    @property
    def busy(self) -> bool:
        """Whether this rank's thread is still writing."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, snapshot: Snapshot, ready: Callable[[], None]) -> None:
        """Begins to write in a thread. The previous checkpoint must be finished.

        Args:
            snapshot: must not change until `result` has returned.
            ready: called in the thread first; waits until the snapshot is complete.
        """
        assert not self.busy, "one checkpoint at a time"
        # Not a daemon: the interpreter's end would tear the thread down inside torch's writer, and abort.
        self._thread = threading.Thread(target=self._run, args=(snapshot, ready), name="checkpoint")
        self._thread.start()

    def write(self, snapshot: Snapshot) -> None:
        """Writes in the calling thread; the result is had from `result` as well."""
        self._run(snapshot, lambda: None)

    def wait(self) -> None:
        """Waits until this rank's thread has ended."""
        if self._thread is not None:
            self._thread.join()

    def result(self) -> str | None:
        """Waits for the checkpoint, and returns why this rank could not write it; None if it could, or must not.

        Raises:
            Exception: what ended the thread, if it was not the disk.
        """
        self.wait()
        self._thread = None
        if self._error is not None:
            raise self._error
        return self._problem

    def _run(self, snapshot: Snapshot, ready: Callable[[], None]) -> None:
        self._problem = self._error = None
        self.bad_networks = []
        try:
            ready()
            if snapshot.sharded:
                self._problem = self._write_shards(snapshot)
            elif self.ranks.first:
                self._problem = self._write_file(snapshot)
        except BaseException as error:  # raised again by `result`, in the main thread
            self._error = error

    def _write_file(self, snapshot: Snapshot) -> str | None:
        self.bad_networks = _bad_networks(snapshot)
        if self.bad_networks:
            return None
        partial = folders.partial_of(snapshot.folder)

        def write() -> None:
            _begin(partial)
            # To a file object: given a name, torch writes a second copy in memory first.
            with open(partial / folders.STATE, "wb") as file:
                torch.save(snapshot.contents, file)

        return _failure(write) or _failure(lambda: self._seal(snapshot, {}))

    def _write_shards(self, snapshot: Snapshot) -> str | None:
        """A collective of the writing threads."""
        found = self.ranks.gathered(_bad_networks(snapshot))
        self.bad_networks = list(dict.fromkeys(name for names in found for name in names))
        if self.bad_networks:
            return None
        partial = folders.partial_of(snapshot.folder)
        problem = _failure(lambda: _begin(partial)) if self.ranks.first else None
        # Also a barrier: no rank writes into a folder that rank 0 is still emptying.
        problem = self.ranks.first_message(problem)
        if problem:
            return problem
        problem = _failure(lambda: self._write_own_shard(snapshot, partial / folders.STATE))
        reports = self.ranks.gathered((problem, {} if problem else self._own_checksums(partial)))
        problem = next((reason for reason, _ in reports if reason), None)
        if self.ranks.first and problem is None:
            sums = {name: one for _, of_rank in reports for name, one in of_rank.items()}
            problem = _failure(lambda: self._seal(snapshot, sums))
        return problem

    def _write_own_shard(self, snapshot: Snapshot, path: Path) -> None:
        """As Lightning's ModelParallelStrategy reads it, which writes over the training's process group."""
        path.mkdir(exist_ok=True)
        rest = dict(snapshot.contents)
        state = {"state_dict": rest.pop("state_dict")}
        for index, optimizer in enumerate(rest.pop("optimizer_states", [])):
            state[f"optimizer_{index}"] = optimizer
        group = self.ranks.host_group() if self.ranks.count > 1 else None
        save_shards(state, checkpoint_id=path, process_group=group, no_dist=group is None)
        if self.ranks.first:
            torch.save(rest, path / META)

    def _own_checksums(self, partial: Path) -> dict[str, str]:
        """Checksums of the shards that this rank wrote, which are in its page cache; rank 0 would have to read them all."""
        prefix = f"__{self.ranks.number}_"
        own = [name for name in folders.files_of(partial) if Path(name).name.startswith(prefix)]
        return folders.checksums(partial, own)

    def _seal(self, snapshot: Snapshot, sums: dict[str, str]) -> None:
        counts = snapshot.counts
        self.size = folders.seal(
            snapshot.folder, counts.updates, counts.iterations, counts.batches, snapshot.starts, sums
        )
        folders.keep_newest(snapshot.folder.parent, self.keep)


def _bad_networks(snapshot: Snapshot) -> list[str]:
    return networks_with_bad_weights(snapshot.contents["state_dict"]) if snapshot.guarded else []


def _begin(partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)


def _failure(action: Callable[[], None]) -> str | None:
    """Why the disk refused; None if it did not.

    Raises:
        Exception: of another cause.
    """
    try:
        action()
    except (OSError, RuntimeError, CheckpointException) as error:
        problem = folders.write_failure(error)
        if problem is None:
            raise
        return problem
    return None
