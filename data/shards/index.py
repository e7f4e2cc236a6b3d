"""Indexes of shards: one pass over the headers of each tar, stored as a sidecar."""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from data.shards.locations import expand_braces, file_name, find_locations, find_shards, is_remote
from data.shards.scan import SampleFault, ShardIndex, scan_members, scan_shard
from data.shards.sidecar import SIDECAR_SUFFIX, load_sidecar, save_sidecar, sidecar_path
from data.shards.store import ShardStore
from data.shards.tar_headers import BrokenShardError

__all__ = [
    "ShardIndex",
    "ShardSet",
    "expand_braces",
    "find_shards",
    "index_shard",
    "scan_shard",
    "sidecar_path",
]
_THREADS = 8  # for sidecars, small files with high latency on network file systems


def index_shard(
    location: str | Path,
    index_folder: str | Path | None = None,
    store: ShardStore | None = None,
    tolerant: bool = False,
) -> ShardIndex:
    """The index of one shard: its sidecar if up to date, otherwise scanned and saved.

    Args:
        location: path, URL or command.
        index_folder: folder of the sidecar; None: next to the shard.
        store: access to remote shards.
        tolerant: whether to return an index with `faults` rather than raise; for a missing or truncated shard the samples
            are those of its former sidecar.

    Raises:
        BrokenShardError: unless tolerant, if the shard is broken.
        OSError: unless tolerant, if it cannot be read.
    """
    location, store = str(location), store or ShardStore()
    sidecar = sidecar_path(location, index_folder)
    try:
        stamp = store.stamp(location)
        index = load_sidecar(sidecar, location, stamp)
        if index is None:
            index = _checked(replace(scan_members(location, store.members(location, stamp)), stamp=stamp))
            former = load_sidecar(sidecar, location, stamp, version=2)  # its checksums are still valid
            if former is not None and former.fingerprint == index.fingerprint:
                index = replace(index, checksums=former.checksums)
            earlier = load_sidecar(sidecar, location, None) if index.faults else None
            if tolerant and earlier is not None and len(earlier) > len(index):
                return replace(earlier, faults=earlier.faults + index.faults, stamp=None)
            save_sidecar(sidecar, index, stamp)
    except OSError as error:
        if not tolerant:
            raise
        return _of_unreachable(location, sidecar, error)
    return index if tolerant else index.require_complete()


def save_index(index: ShardIndex, index_folder: str | Path | None) -> None:
    """Save an extended index with the stamp of the file that it was made from."""
    if index.stamp is not None:
        save_sidecar(sidecar_path(index.location, index_folder), index, index.stamp)


def stated_samples(location: str) -> int | None:
    """Number of samples in img2dataset's `00000_stats.json` next to a local shard; None if unknown."""
    if is_remote(location):
        return None
    path = Path(location)
    try:
        stated = json.loads(path.with_name(path.name.removesuffix(".tar") + "_stats.json").read_text())
        return int(stated["successes"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def _checked(index: ShardIndex) -> ShardIndex:
    """Add a fault if img2dataset's number of samples differs, for example for a tar truncated between two samples."""
    stated = stated_samples(index.location)
    if stated is None or stated == len(index) or index.faults:
        return index
    reason = (
        f"{index.location} holds {len(index)} samples, but its _stats.json counts {stated}; write or copy it "
        "again, or remove that file if the shard was changed on purpose."
    )
    return replace(index, faults=(SampleFault("", reason),))


def _of_unreachable(location: str, sidecar: Path, error: OSError) -> ShardIndex:
    fault = SampleFault("", f"{location} cannot be read ({error}).")
    known = load_sidecar(sidecar, location, None)
    if known is not None:
        return replace(known, faults=(*known.faults, fault), stamp=None)
    return replace(scan_members(location, ()), faults=(fault,))


@dataclass(frozen=True)
class ShardSet:
    """The indexes of all shards of a data set, in order."""

    shards: tuple[ShardIndex, ...]

    @classmethod
    def open(
        cls,
        shards: str | Path | Sequence[str | Path],
        index_folder: str | Path | None = None,
        store: ShardStore | None = None,
        tolerant: bool = False,
    ) -> "ShardSet":
        """Find and index shards; arguments as for `index_shard`.

        Raises:
            FileNotFoundError: if there are none.
            BrokenShardError: if one is not a complete tar, or if none has a sample.
        """
        locations = find_locations(shards, gone=SIDECAR_SUFFIX if tolerant and index_folder is None else None)
        with ThreadPoolExecutor(_THREADS if len(locations) > 1 else 1) as threads:
            indexes = threads.map(
                lambda location: index_shard(location, index_folder, store, tolerant), locations
            )
            found = cls(tuple(indexes))
        if not sum(found.sizes):
            faults = [fault.reason for index in found.shards for fault in index.faults]
            raise BrokenShardError(
                f"{len(found.shards)} shards were found, from {found.shards[0].location} on, but they hold no "
                f"sample{': ' + faults[0] if faults else '.'}"
            )
        return found

    @property
    def sizes(self) -> list[int]:
        """Samples in each shard."""
        return [len(shard) for shard in self.shards]

    @property
    def fingerprint(self) -> str:
        """Fingerprint of all samples in order, independent of the folder."""
        return _digest(f"{file_name(shard.location)} {shard.fingerprint}" for shard in self.shards)

    def names(self) -> list[str]:
        """A unique name for each shard: its path without '.tar', relative to the common parent folder."""
        paths = [_unique_path(shard.location) for shard in self.shards]
        common = os.path.commonpath([path.parent for path in paths])
        return [path.relative_to(common).with_suffix("").as_posix() for path in paths]


def _unique_path(location: str) -> Path:
    """The URL of a remote shard, or the text of a command, as a path."""
    if not is_remote(location):
        return Path(location).resolve()
    return Path("/", *[part for part in location.replace("\0", "").split("/") if part not in ("", ".", "..")])


def _digest(lines: Iterable[str]) -> str:
    return hashlib.blake2b("\n".join(lines).encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
