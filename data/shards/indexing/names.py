"""Names of shards in sample ids."""

import os
from collections.abc import Sequence
from pathlib import Path

from data.shards.locations import is_remote


def unique_names(locations: Sequence[str], linked: Sequence[bool] | None = None) -> list[str]:
    """A unique name for each shard: its path without '.tar', relative to the common parent folder.

    Args:
        locations: of the shards.
        linked: whether each is a symbolic link; None looks at the files.
    """
    folders: dict[str, str] = {}
    split: list[tuple[str, str]] = []
    for number, location in enumerate(locations):
        if is_remote(location):
            # The URL, or the text of a command, as a path.
            parts = [part for part in location.replace("\0", "").split("/") if part not in ("", ".", "..")]
            split.append(("/" + "/".join(parts[:-1]), parts[-1]))
            continue
        is_link = os.path.islink(location) if linked is None else linked[number]
        folder, _, name = (str(Path(location).resolve()) if is_link else location).rpartition("/")
        folder = folder or ("/" if location.startswith("/") else ".")
        if (real := folders.get(folder)) is None:
            # Once for each folder: every look-up of a path takes time on network file systems.
            real = folders[folder] = os.path.realpath(folder)
        split.append((real, name))
    common = os.path.commonpath({folder for folder, _ in split})
    prefixes = {folder: _relative(folder, common) for folder, _ in split}
    return [prefixes[folder] + _stem(name) for folder, name in split]


def _relative(folder: str, common: str) -> str:
    inside = folder[len(common) :].strip("/")
    return inside + "/" if inside else ""


def _stem(name: str) -> str:
    """A name without its suffix, as pathlib takes it off."""
    dot = name.rfind(".")
    return name[:dot] if 0 < dot < len(name) - 1 else name
