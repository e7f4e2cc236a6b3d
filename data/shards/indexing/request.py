"""Which shards are indexed, how, and where the index is kept."""

import functools
import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from data.shards.indexing.packed import GONE
from data.shards.locations import Stamp
from data.shards.scan import ShardIndex

_log = logging.getLogger(__name__)

PACKED_SUFFIX = ".packed-index"
PACKED_FROM = 16
"""Fewer shards are read from their sidecars, unless these cannot be written."""
THREADS = 8
"""For small reads with high latency on network file systems."""
_STATES_AT_ONCE = 64

IndexOne = Callable[[str, ShardIndex | None, bool], ShardIndex]
"""Indexes one shard: its location, its index in an outdated file, and whether its sidecar can be written."""


@dataclass(frozen=True)
class IndexRequest:
    """Shards, and how they are indexed."""

    locations: Sequence[str]
    index_folder: str | Path | None
    """Folder of the indexes; None: next to the shards."""
    stamp: Callable[[str], Stamp]
    """Current state of a shard."""
    index_one: IndexOne
    tolerant: bool = False
    """Whether a shard that cannot be accessed is a fault rather than an error."""
    sized: str | None = None
    """Image sizes that are wanted: "images", "latents" or None."""

    @functools.cached_property
    def name(self) -> str:
        """File name of the packed index."""
        text = "\n".join(self.locations).encode("utf-8", "surrogateescape")
        return f"shards-{hashlib.blake2b(text, digest_size=8).hexdigest()}{PACKED_SUFFIX}"

    @functools.cached_property
    def writable(self) -> dict[Path, bool]:
        """Folders of the sidecars, and whether these can be written."""
        if self.index_folder is not None:
            folders = [Path(self.index_folder).expanduser()]
        else:
            one_of_each = {location.rpartition("/")[0]: location for location in self.locations}
            folders = [Path(os.path.dirname(location)) for location in one_of_each.values()]
        return {folder: _is_writable(folder) for folder in folders}

    @property
    def own_folder(self) -> Path:
        """Folder where the index belongs."""
        return next(
            (folder for folder, writable in self.writable.items() if writable), next(iter(self.writable))
        )

    @property
    def folders(self) -> list[Path]:
        """Folders in which the packed index may be, preferred first."""
        return list(dict.fromkeys([self.own_folder, fallback_folder()]))

    @property
    def is_packed(self) -> bool:
        """Whether these shards have a packed index."""
        return len(self.locations) >= PACKED_FROM or not all(self.writable.values())

    def index(self, location: str, former: ShardIndex | None = None) -> ShardIndex:
        """`index_one`, with its sidecar where that can be written."""
        folder = Path(os.path.dirname(location)) if self.index_folder is None else Path(self.index_folder)
        return self.index_one(location, former, self.writable[folder.expanduser()])

    def state(self, location: str) -> Stamp:
        """Current state of a shard, or `GONE`."""
        try:
            return self.stamp(location)
        except OSError:
            if not self.tolerant:
                raise
            return GONE

    def states(self, locations: Sequence[str]) -> list[Stamp]:
        """Current states of shards, some at a time."""
        with ThreadPoolExecutor(THREADS) as threads:
            groups = [locations[i : i + _STATES_AT_ONCE] for i in range(0, len(locations), _STATES_AT_ONCE)]
            found = threads.map(lambda group: [self.state(one) for one in group], groups)
            return [state for group in found for state in group]


def fallback_folder() -> Path:
    """Where the indexes of folders are that cannot be written."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "sdxs-lightning" / "indexes"


def _is_writable(folder: Path) -> bool:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


@functools.cache
def warn_once(message: str) -> None:
    """Logs a message once, on the first rank."""
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        _log.warning(message)
