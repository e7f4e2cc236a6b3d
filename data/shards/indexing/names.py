"""Names of shards in sample ids."""

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.shards.indexing.on_demand import OnDemand
from data.shards.locations import is_remote


class ShardNames(OnDemand[str]):
    """A unique name for each shard: its path without '.tar', relative to the common parent folder.

    A name is made when it is asked for: a large set has no object for each shard.

    Args:
        locations: of the shards.
        linked: whether each is a symbolic link; None looks at the files.
    """

    def __init__(
        self, locations: Sequence[str], linked: Sequence[bool] | NDArray[np.uint8] | None = None
    ) -> None:
        self._locations = locations
        self._targets: dict[int, str] = {}
        """Paths of the links, by number."""
        if linked is None:
            linked = [not is_remote(location) and os.path.islink(location) for location in locations]
        for number in np.flatnonzero(linked).tolist():
            self._targets[number] = str(Path(locations[number]).resolve())
        real: dict[str, str] = {}
        # Once for each folder: every look-up of a path takes time on network file systems.
        for location in chain(_one_of_each_folder(locations), self._targets.values()):
            folder = _split(location)[0]
            remote = folder.startswith(_REMOTE)
            real[folder] = folder[len(_REMOTE) :] if remote else os.path.realpath(folder)
        common = os.path.commonpath(set(real.values()))
        self._prefixes = {folder: _relative(path, common) for folder, path in real.items()}

    def __len__(self) -> int:
        """Shards."""
        return len(self._locations)

    def item(self, number: int) -> str:
        """The name of a shard."""
        folder, name = _split(self._targets.get(number) or self._locations[number])
        return self._prefixes[folder] + _stem(name)


_REMOTE = "\0"
"""Begins the folder of a URL, so that it is never that of a local file."""


def _one_of_each_folder(locations: Iterable[str]) -> Iterator[str]:
    """The locations without those in the folder of an earlier one."""
    seen: set[str] = set()
    for location in locations:
        folder = location.rpartition("/")[0]
        if folder in seen:
            continue
        yield location
        # What follows the last slash of a command or a short URL may be all of it.
        if folder and not is_remote(location):
            seen.add(folder)


def _split(location: str) -> tuple[str, str]:
    """Folder and name of a shard."""
    if not is_remote(location):
        folder, _, name = location.rpartition("/")
        return folder or ("/" if location.startswith("/") else "."), name
    # The URL, or the text of a command, as a path.
    parts = [part for part in location.replace("\0", "").split("/") if part not in ("", ".", "..")]
    return f"{_REMOTE}/{'/'.join(parts[:-1])}", parts[-1]


def _relative(folder: str, common: str) -> str:
    inside = folder[len(common) :].strip("/")
    return inside + "/" if inside else ""


def _stem(name: str) -> str:
    """A name without its suffix, as pathlib takes it off."""
    dot = name.rfind(".")
    return name[:dot] if 0 < dot < len(name) - 1 else name
