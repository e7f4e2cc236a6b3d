"""Whether what a command is to write fits the disk, asked before the first byte."""

from __future__ import annotations

import shutil
from pathlib import Path

from sdxs_lightning.core.errors import UserError

SMALLEST_FILE_BYTES = 4096
"""A block of the usual file systems: what any file takes."""


def check_room(folder: Path, count: int, bytes_each: int, option: str, things: str, present: int = 0) -> None:
    """Refuses a number of files or samples for which the disk has no room, whatever is in them.

    Args:
        folder: where they go; it need not exist. Of a URL nothing is known.
        count: how many.
        bytes_each: the least that one takes.
        option: that says how many, for the message.
        things: what they are, for the message.
        present: bytes of those that are there already.

    Raises:
        UserError: naming both numbers.
    """
    if ":/" in str(folder):
        return
    free = free_bytes(folder)
    if free >= 0 and count * bytes_each > free + present:
        raise UserError(
            f"{count:,} {things} of at least {_shown(bytes_each)} each need {_shown(count * bytes_each)}, and "
            f"'{existing_part(folder)}' has {_shown(free)} free; give a smaller {option}, or another --out."
        )


def free_bytes(folder: Path) -> int:
    """Free bytes of the file system that a folder is, or will be, on; -1 if it cannot be read."""
    try:
        return shutil.disk_usage(existing_part(folder)).free
    except OSError:
        return -1


def existing_part(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(one for one in (folder.absolute(), *folder.absolute().parents) if one.exists())


def _shown(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} PB"
