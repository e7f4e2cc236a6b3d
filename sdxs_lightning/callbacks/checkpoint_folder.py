"""Checkpoints on disk: one folder each, which is either complete or absent.

    <run>/checkpoints/update_00000500-batch_00003000/
        state.ckpt       Lightning's file, or with FSDP2 its folder of shards
        manifest.json    size and checksum of every other file, and the run's counters

A checkpoint is written under a name that begins with a dot, forced to the disk, and then renamed: a crash at any moment
leaves the previous ones as they were. By its manifest a checkpoint with a missing or shorter file is never chosen, and one
with changed contents is refused when it is loaded.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from torch.distributed.checkpoint.api import CheckpointException

STATE = "state.ckpt"
MANIFEST = "manifest.json"
CHUNK_BYTES = 64 * 1024 * 1024


class Manifest(NamedTuple):
    """A checkpoint's description of itself."""

    sizes: dict[str, int]
    """Bytes of every file, by its path inside the folder."""
    saved_at: float
    """Seconds since 1970, for the reader: clocks of two nodes differ, so it decides nothing."""
    student_updates: int
    iterations: int
    batches: int
    starts: int = 0
    """How often the run had been started: a resumed run writes newer checkpoints than the ones that it left behind, also
    where it went back to an older one. 0 until version 0.1."""
    checksums: dict[str, str] | None = None
    """`checksum` of every file; None until version 0.1."""

    @property
    def age(self) -> tuple[int, int, int]:
        """Orders the checkpoints of a run, newest last; by counters, never by a clock."""
        return self.starts, self.batches, self.student_updates


def checkpoint_name(student_updates: int, batches: int) -> str:
    """The folder's name; batches tell apart two checkpoints between the same student updates."""
    return f"update_{student_updates:08d}-batch_{batches:08d}"


def partial_of(folder: Path) -> Path:
    """Where a checkpoint is while it is being written."""
    return folder.with_name(f".{folder.name}.partial")


def checksum(path: Path) -> str:
    """SHA-256 over the SHA-256 of each 64 MiB of a file: computed on several cores, 24 GB in seconds."""

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
    """`checksum` of some files of a folder; "" for one that cannot be read."""
    found = {}
    for name in names:
        try:
            found[name] = checksum(folder / name)
        except OSError:
            found[name] = ""
    return found


def files_of(folder: Path) -> list[str]:
    """All files of a checkpoint but the manifest, by their paths inside it."""
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
    """Turns what was written at `partial_of(folder)` into the complete checkpoint `folder`.

    Args:
        folder: its final place.
        student_updates: of the run so far, as are iterations, batches and starts.
        starts: how often the run has been started.
        sums: checksums by file; those that are not given are computed here.

    Returns:
        Its size in bytes.

    Raises:
        OSError: when the disk refuses, or a file with a checksum is missing; what was there before is untouched.
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
    (partial / MANIFEST).write_text(json.dumps(manifest._asdict(), indent=1) + "\n")
    _force_to_disk(partial / MANIFEST)
    for inner in sorted(path for path in partial.rglob("*") if path.is_dir()):
        _force_to_disk(inner)
    _force_to_disk(partial)
    if folder.exists():  # written twice in one place of the run: the content is the same
        shutil.rmtree(folder)
    partial.rename(folder)
    _force_to_disk(folder.parent)
    return sum(sizes.values())


def read_manifest(folder: Path) -> Manifest | None:
    """Returns the manifest of a checkpoint, or None if it cannot be read."""
    try:
        content = json.loads((folder / MANIFEST).read_text())
        if "turns" in content:  # what "iterations" was called until version 0.1
            content["iterations"] = content.pop("turns")
        manifest = Manifest(**content)
        sums = manifest.checksums or {}
        numbers = [*manifest.age, manifest.iterations, *manifest.sizes.values()]
        typed = all(type(number) is int for number in numbers) and isinstance(sums, dict)
        return manifest if typed else None
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def complete(folder: Path) -> bool:
    """Whether every file of the checkpoint is there with the size that it had when written. Reads no contents."""
    manifest = read_manifest(folder)
    if manifest is None or not manifest.sizes:
        return False
    return all(
        (folder / name).is_file() and (folder / name).stat().st_size == size
        for name, size in manifest.sizes.items()
    )


def changed_file(folder: Path, sums: Mapping[str, str]) -> str | None:
    """The first file whose checksum is not the manifest's, or None. A checkpoint without checksums cannot tell.

    Args:
        folder: a complete checkpoint.
        sums: of its files, or of some of them.
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
    """The number of the start that begins now: one more than that of any checkpoint in the folder."""
    if not folder.is_dir():
        return 1
    manifests = (read_manifest(path) for path in folder.iterdir())
    return 1 + max((manifest.starts for manifest in manifests if manifest is not None), default=0)


def newest_complete_checkpoint(folder: str | Path) -> Path | None:
    """Returns the newest complete checkpoint, or None."""
    found = complete_checkpoints(Path(folder))
    return found[-1] if found else None


def incomplete_checkpoints(folder: Path) -> list[Path]:
    """Returns the folders that are not complete checkpoints, unfinished writes included."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and not complete(path))


def keep_newest(folder: Path, count: int) -> None:
    """Removes all but the newest complete checkpoints, and the remains of unfinished writes."""
    for old in list(reversed(complete_checkpoints(folder)))[count:]:
        # Renamed first, so that a removal that breaks off leaves no half checkpoint under a good name.
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
    """Returns the system's reason for a failed write; None if the exception comes from elsewhere, so is a bug."""
    chain = list(_chain(error))
    for one in chain:
        if isinstance(one, OSError):
            return os.strerror(one.errno).lower() if one.errno is not None else str(one)
    # torch's zip writer tells a short write like this and drops the system's reason.
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
