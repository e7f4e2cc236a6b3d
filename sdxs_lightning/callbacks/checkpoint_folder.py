"""Checkpoints on disk: a folder each, that is either complete or not there.

    <run>/checkpoints/update_00000500-batch_00003000/
        state.ckpt       Lightning's file, or with FSDP2 its folder of shards
        manifest.json    the size of every other file, and when and where in the run it was written

A checkpoint is written under a name that begins with a dot, forced to the disk, and then renamed: a crash at any moment
leaves the previous ones as they were. The manifest says more: a copy that broke off, or a disk that lied, shows as a
file of the wrong size, and such a checkpoint is never chosen.
"""

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from torch.distributed.checkpoint.api import CheckpointException

STATE = "state.ckpt"
MANIFEST = "manifest.json"


class Manifest(NamedTuple):
    """What a checkpoint says about itself."""

    sizes: dict[str, int]
    """Bytes of every file, by its path inside the folder."""
    saved_at: float
    """Seconds since 1970: the newest checkpoint is the one written last."""
    student_updates: int
    iterations: int
    batches: int


def checkpoint_name(student_updates: int, batches: int) -> str:
    """The folder's name; batches tell apart two checkpoints between the same student updates."""
    return f"update_{student_updates:08d}-batch_{batches:08d}"


def partial_of(folder: Path) -> Path:
    """Where a checkpoint is while it is being written."""
    return folder.with_name(f".{folder.name}.partial")


def seal(folder: Path, student_updates: int, iterations: int, batches: int) -> int:
    """Turns what was written at `partial_of(folder)` into the complete checkpoint `folder`.

    Args:
        folder: its final place.
        student_updates: of the run so far, as are iterations and batches.

    Returns:
        Its size in bytes.

    Raises:
        OSError: when the disk does not take it; what was there before is untouched.
    """
    partial = partial_of(folder)
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    for path in files:
        _force_to_disk(path)
    sizes = {path.relative_to(partial).as_posix(): path.stat().st_size for path in files}
    manifest = Manifest(sizes, time.time(), student_updates, iterations, batches)
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
    """The manifest of a checkpoint, if there is one that can be read."""
    try:
        content = json.loads((folder / MANIFEST).read_text())
        if "turns" in content:  # what "iterations" was called until version 0.1
            content["iterations"] = content.pop("turns")
        return Manifest(**content)
    except (OSError, ValueError, TypeError):
        return None


def complete(folder: Path) -> bool:
    """Whether every file of the checkpoint is there and of the size that it had when written."""
    manifest = read_manifest(folder)
    if manifest is None or not manifest.sizes:
        return False
    return all(
        (folder / name).is_file() and (folder / name).stat().st_size == size
        for name, size in manifest.sizes.items()
    )


def complete_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first; an absent folder has none."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if not path.name.startswith(".") and complete(path)]

    def age(path: Path) -> tuple[float, int]:
        manifest = read_manifest(path)
        assert manifest is not None
        return manifest.saved_at, manifest.batches

    return sorted(found, key=age)


def newest_complete_checkpoint(folder: str | Path) -> Path | None:
    """The complete checkpoint that was written last, or None."""
    found = complete_checkpoints(Path(folder))
    return found[-1] if found else None


def incomplete_checkpoints(folder: Path) -> list[Path]:
    """What looks like a checkpoint in a folder and is not complete, unfinished writes included."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and not complete(path))


def keep_newest(folder: Path, count: int) -> None:
    """Removes all but the newest complete checkpoints, and what unfinished writes left behind."""
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
    """Why the disk refused, in the system's words; None where the exception is not the disk's doing but a bug of ours."""
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
    """An exception and those behind it; torch.distributed.checkpoint keeps the ranks' own in `failures`."""
    while error is not None:
        yield error
        if isinstance(error, CheckpointException):
            for inner, _ in error.failures.values():
                yield from _chain(inner)
        error = error.__cause__ or error.__context__
