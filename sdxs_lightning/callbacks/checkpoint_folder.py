"""Checkpoints on disk: one folder each, which is either complete or absent.

    <run>/checkpoints/update_00000500-batch_00003000/
        state.ckpt       Lightning's file, or with FSDP2 its folder of shards
        manifest.json    size and checksum of every other file, and the run's counters

A checkpoint is written under a name that starts with a dot, synced to disk, and then renamed: a crash at any moment leaves the
previous ones intact. By the manifest, a checkpoint with a missing or truncated file is never chosen, and one with changed
contents is rejected on load; the manifest has a checksum of itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from torch.distributed.checkpoint.api import CheckpointException

STATE = "state.ckpt"
MANIFEST = "manifest.json"
CHUNK_BYTES = 64 * 1024 * 1024


class Manifest(NamedTuple):
    """Contents of a checkpoint's manifest.json."""

    sizes: dict[str, int]
    """Size in bytes of every file, by its path in the folder."""
    saved_at: float
    """Unix time, informational only, since the clocks of nodes differ."""
    student_updates: int
    iterations: int
    batches: int
    starts: int = 0
    """How often the run had been started. Makes the checkpoints of a resumed run newer than all earlier ones, even if it
    resumed from an older one. 0 until version 0.1."""
    checksums: dict[str, str] | None = None
    """`checksum` of every file; None until version 0.1."""
    own_checksum: str | None = None
    """`hash_of_entries` of the file; None until version 0.1."""

    @property
    def age(self) -> tuple[int, int, int]:
        """Sort key of a run's checkpoints, newest last; by counters rather than clocks."""
        return self.starts, self.batches, self.student_updates

    def with_checksum(self) -> Manifest:
        """The same with its `own_checksum`: a flipped bit in a counter would make another checkpoint the newest one."""
        return self._replace(own_checksum=hash_of_entries(self._asdict()))


def hash_of_entries(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of all entries of a manifest, those of a later version too, but for this hash."""
    entries = {name: value for name, value in manifest.items() if name != "own_checksum"}
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def checkpoint_name(student_updates: int, batches: int) -> str:
    """The folder's name; batches distinguish checkpoints between the same student updates."""
    return f"update_{student_updates:08d}-batch_{batches:08d}"


def partial_of(folder: Path) -> Path:
    """The temporary path of a checkpoint while it is being written."""
    return folder.with_name(f".{folder.name}.partial")


def checksum(path: Path) -> str:
    """SHA-256 over the SHA-256 of each 64 MiB chunk, computed in parallel: seconds for 24 GB."""

    def of_chunk(start: int) -> bytes:
        with path.open("rb") as file:
            file.seek(start)
            return hashlib.sha256(file.read(CHUNK_BYTES)).digest()

    starts = range(0, path.stat().st_size, CHUNK_BYTES)
    if len(starts) <= 1:
        digests = [of_chunk(start) for start in starts]
    else:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            digests = list(pool.map(of_chunk, starts))
    return hashlib.sha256(b"".join(digests)).hexdigest()


def checksums(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """`checksum` of the named files of a folder; "" for an unreadable one."""
    found = {}
    for name in names:
        try:
            found[name] = checksum(folder / name)
        except OSError:
            found[name] = ""
    return found


def files_of(folder: Path) -> list[str]:
    """Paths in the folder of all files of a checkpoint except the manifest."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path.relative_to(folder).as_posix() for path in files if path.name != MANIFEST)


def seal(
    folder: Path,
    student_updates: int,
    iterations: int,
    batches: int,
    starts: int = 0,
    sums: Mapping[str, str] | None = None,
) -> int:
    """Turns the partial checkpoint at `partial_of(folder)` into the complete checkpoint `folder`.

    Args:
        folder: final path.
        student_updates: of the run so far, like iterations and batches.
        starts: how often the run has been started.
        sums: known checksums by file; the others are computed here.

    Returns:
        Size in bytes.

    Raises:
        OSError: if writing fails, or a file with a known checksum is missing; earlier checkpoints are untouched.
    """
    partial = partial_of(folder)
    names = files_of(partial)
    missing = sorted(set(sums or {}) - set(names))
    if missing:
        raise OSError(f"{', '.join(missing)} of another rank cannot be seen: is it a disk of its own node?")
    for name in names:
        _force_to_disk(partial / name)
    sizes = {name: (partial / name).stat().st_size for name in names}
    known = dict(sums or {})
    known |= {name: checksum(partial / name) for name in names if name not in known}
    manifest = Manifest(sizes, time.time(), student_updates, iterations, batches, starts, known)
    (partial / MANIFEST).write_text(json.dumps(manifest.with_checksum()._asdict(), indent=1) + "\n")
    _force_to_disk(partial / MANIFEST)
    for inner in sorted(path for path in partial.rglob("*") if path.is_dir()):
        _force_to_disk(inner)
    _force_to_disk(partial)
    if folder.exists():  # written twice at the same point of the run, with the same content
        shutil.rmtree(folder)
    partial.rename(folder)
    _force_to_disk(folder.parent)
    return sum(sizes.values())


def read_manifest(folder: Path) -> Manifest | None:
    """Returns the manifest of a checkpoint, or None if it cannot be read or has changed since it was written."""
    try:
        content = json.loads((folder / MANIFEST).read_text())
        whole = content.get("own_checksum") in (None, hash_of_entries(content))
        if "turns" in content:  # the name of "iterations" until version 0.1
            content["iterations"] = content.pop("turns")
        manifest = Manifest(**{name: content[name] for name in Manifest._fields if name in content})
        sums = manifest.checksums or {}
        numbers = [*manifest.age, manifest.iterations, *manifest.sizes.values()]
        typed = all(type(number) is int for number in numbers) and isinstance(sums, dict)
        return manifest if typed and whole else None
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def complete(folder: Path) -> bool:
    """Whether all files of the checkpoint exist with their recorded sizes. Reads no contents."""
    manifest = read_manifest(folder)
    if manifest is None or not manifest.sizes:
        return False
    return all(
        (folder / name).is_file() and (folder / name).stat().st_size == size
        for name, size in manifest.sizes.items()
    )


def changed_file(folder: Path, sums: Mapping[str, str]) -> str | None:
    """Returns the first file whose checksum differs from the manifest's, or None; None also without recorded checksums.

    Args:
        folder: a complete checkpoint.
        sums: checksums of all or some of its files.
    """
    manifest = read_manifest(folder)
    wanted = (manifest.checksums if manifest is not None else None) or {}
    return next((name for name, value in sums.items() if wanted.get(name, value) != value), None)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Returns the complete checkpoints in a folder, oldest first; none if the folder is absent."""
    if not folder.is_dir():
        return []
    found = []
    for path in folder.iterdir():
        manifest = None if path.name.startswith(".") else read_manifest(path)
        if manifest is not None and complete(path):
            found.append((manifest.age, path))
    return [path for _, path in sorted(found)]


def next_start(folder: Path) -> int:
    """The number of the current start: one more than the highest of the checkpoints in the folder."""
    if not folder.is_dir():
        return 1
    manifests = (read_manifest(path) for path in folder.iterdir())
    return 1 + max((manifest.starts for manifest in manifests if manifest is not None), default=0)


def newest_complete_checkpoint(folder: str | Path) -> Path | None:
    """Returns the newest complete checkpoint, or None."""
    found = complete_checkpoints(Path(folder))
    return found[-1] if found else None


def incomplete_checkpoints(folder: Path) -> list[Path]:
    """Returns the checkpoints that are not complete, unfinished writes included; not a folder of another name."""
    if not folder.is_dir():
        return []
    named = (path for path in folder.iterdir() if path.name.lstrip(".").startswith("update_"))
    return sorted(path for path in named if path.is_dir() and not complete(path))


def keep_newest(folder: Path, count: int) -> None:
    """Removes all but the newest complete checkpoints, and the remains of unfinished writes."""
    for old in list(reversed(complete_checkpoints(folder)))[count:]:
        # Renamed first, so that an interrupted removal leaves no incomplete checkpoint under a final name.
        doomed = partial_of(old)
        shutil.rmtree(doomed, ignore_errors=True)
        old.rename(doomed)
    for leftover in folder.glob(".*.partial"):
        shutil.rmtree(leftover, ignore_errors=True)


def _force_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_failure(error: BaseException) -> str | None:
    """Returns the operating system's reason for a failed write; None if the exception has another cause, and so is a bug."""
    chain = list(_chain(error))
    for one in chain:
        if isinstance(one, OSError):
            return os.strerror(one.errno).lower() if one.errno is not None else str(one)
    # torch's zip writer raises this on a short write and drops the system's reason.
    torch_writer = ("inline_container", "PytorchStreamWriter", "iostream")
    if any(isinstance(one, RuntimeError) and any(word in str(one) for word in torch_writer) for one in chain):
        return "the file could not be written to its end"
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an exception and its causes; torch.distributed.checkpoint keeps those of the ranks in `failures`."""
    while error is not None:
        yield error
        if isinstance(error, CheckpointException):
            for inner, _ in error.failures.values():
                yield from _chain(inner)
        error = error.__cause__ or error.__context__
