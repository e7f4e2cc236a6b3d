"""Indexes of shards: one pass over the headers of each tar, stored as a sidecar."""

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.shards.indexing.building import mark_outdated, open_indexes
from data.shards.indexing.names import ShardNames
from data.shards.indexing.on_demand import OnDemand
from data.shards.indexing.packed import PackedIndexes
from data.shards.indexing.request import IndexRequest
from data.shards.indexing.table import ShardTable
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


def index_shard(
    location: str | Path,
    index_folder: str | Path | None = None,
    store: ShardStore | None = None,
    tolerant: bool = False,
    former: ShardIndex | None = None,
    saved: bool = True,
) -> ShardIndex:
    """The index of one shard: its sidecar if up to date, otherwise scanned and saved.

    Args:
        location: path, URL or command.
        index_folder: folder of the sidecar; None: next to the shard.
        store: access to remote shards.
        tolerant: whether to return an index with `faults` rather than raise; for a missing or truncated shard the samples
            are those of its former sidecar.
        former: an earlier index, for a shard without a sidecar.
        saved: whether to save the sidecar.

    Raises:
        BrokenShardError: unless tolerant, if the shard is broken.
        OSError: unless tolerant, if it cannot be read.
    """
    location, store = str(location), store or ShardStore()
    sidecar = sidecar_path(location, index_folder)
    try:
        stamp = store.stamp(location)
        index = load_sidecar(sidecar, location, stamp)
        if index is None and former is not None and former.stamp == stamp:
            index = former
        if index is None:
            index = _checked(replace(scan_members(location, store.members(location, stamp)), stamp=stamp))
            older = load_sidecar(sidecar, location, stamp, version=2)  # its checksums are still valid
            if older is not None and older.fingerprint == index.fingerprint:
                index = replace(index, checksums=older.checksums)
            earlier = (load_sidecar(sidecar, location, None) or former) if index.faults else None
            if tolerant and earlier is not None and len(earlier) > len(index):
                return _with_faults(earlier, index.faults)
            if saved:
                save_sidecar(sidecar, index, stamp)
    except OSError as error:
        if not tolerant:
            raise
        return _of_unreachable(location, sidecar, error, former)
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


def _with_faults(known: ShardIndex, faults: Sequence[SampleFault]) -> ShardIndex:
    """The index of an earlier state of a shard, with its present faults."""
    added = tuple(fault for fault in faults if fault not in known.faults)
    return replace(known, faults=known.faults + added, stamp=None)


def _of_unreachable(
    location: str, sidecar: Path, error: OSError, former: ShardIndex | None = None
) -> ShardIndex:
    fault = SampleFault("", f"{location} cannot be read ({error}).")
    known = load_sidecar(sidecar, location, None) or former
    if known is not None:
        return _with_faults(known, [fault])
    return replace(scan_members(location, ()), faults=(fault,))


@dataclass(frozen=True)
class ShardSet:
    """The indexes of all shards of a data set, in order."""

    shards: Sequence[ShardIndex]

    @classmethod
    def open(
        cls,
        shards: str | Path | Sequence[str | Path],
        index_folder: str | Path | None = None,
        store: ShardStore | None = None,
        tolerant: bool = False,
        sized: str | None = None,
        checked: bool = False,
    ) -> "ShardSet":
        """Find and index shards; arguments as for `index_shard`.

        Args:
            shards: a folder, a glob, a brace pattern, a URL or several of these.
            index_folder: folder of the indexes; None: next to the shards.
            store: access to remote shards.
            tolerant: whether faults are listed in the indexes rather than raised.
            sized: "images" or "latents" adds their sizes; None adds none.
            checked: whether `discard_outdated` was called on this node just before.

        Raises:
            FileNotFoundError: if there are none.
            BrokenShardError: if one is not a complete tar, or if none has a sample.
        """
        request = _request(shards, index_folder, store or ShardStore(), tolerant, sized)
        found = cls(open_indexes(request, checked))
        faults = [fault.reason for _, fault in found.table.faults]
        if faults and not tolerant:
            raise BrokenShardError(faults[0])
        if not sum(found.sizes):
            raise BrokenShardError(
                f"{len(found.shards)} shards were found, from {found.table.locations[0]} on, but they hold no "
                f"sample{': ' + faults[0] if faults else '.'}"
            )
        return found

    def __getstate__(self) -> dict[str, Any]:
        """State without the table, whose columns are in the packed index."""
        return {"shards": self.shards}

    @cached_property
    def table(self) -> ShardTable:
        """What is known of each shard without reading its index."""
        if isinstance(self.shards, PackedIndexes | JoinedIndexes):
            return self.shards.table
        return ShardTable.of(self.shards)

    @property
    def sizes(self) -> list[int]:
        """Samples in each shard."""
        sizes: list[int] = self.table.counts.tolist()
        return sizes

    @cached_property
    def fingerprint(self) -> str:
        """Fingerprint of all samples in order, independent of the folder."""
        prints = self.table.fingerprints.tobytes().hex()
        return _digest(
            f"{file_name(location)} {prints[32 * number : 32 * number + 32]}"
            for number, location in enumerate(self.table.locations)
        )

    def names(self) -> Sequence[str]:
        """A unique name for each shard: its path without '.tar', relative to the common parent folder."""
        linked = self.shards.linked if isinstance(self.shards, PackedIndexes | JoinedIndexes) else None
        return ShardNames(self.table.locations, linked)


class JoinedIndexes(OnDemand[ShardIndex]):
    """The indexes of several sets, one after another."""

    def __init__(self, sets: Sequence[ShardSet]) -> None:
        self._sets = list(sets)
        self._ends = list(accumulate(len(one.shards) for one in sets))
        self.table = ShardTable.joined([one.table for one in sets])

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the sets, without the joined table."""
        return JoinedIndexes, (self._sets,)

    @property
    def linked(self) -> NDArray[np.uint8]:
        """Whether each shard is a symbolic link."""
        return np.concatenate(
            [
                one.shards.linked
                if isinstance(one.shards, PackedIndexes)
                else np.array([os.path.islink(location) for location in one.table.locations], np.uint8)
                for one in self._sets
            ]
        )

    def __len__(self) -> int:
        """Shards."""
        return self._ends[-1]

    def item(self, number: int) -> ShardIndex:
        """The index of a shard."""
        place = bisect_right(self._ends, number)
        return self._sets[place].shards[number - (self._ends[place - 1] if place else 0)]


def discard_outdated(
    shards: str | Path | Sequence[str | Path],
    index_folder: str | Path | None,
    store: ShardStore,
    tolerant: bool,
    sized: str | None = None,
) -> None:
    """Compare the packed index of shards with their states, so that other processes of this node need not.

    Few shards are indexed at once. Arguments and errors as for `ShardSet.open`.
    """
    request = _request(shards, index_folder, store, tolerant, sized)
    if not request.is_packed:
        open_indexes(request)
    else:
        mark_outdated(request)


def _request(
    shards: str | Path | Sequence[str | Path],
    index_folder: str | Path | None,
    store: ShardStore,
    tolerant: bool,
    sized: str | None,
) -> IndexRequest:
    locations = find_locations(shards, gone=SIDECAR_SUFFIX if tolerant and index_folder is None else None)
    if index_folder is None and (remote := next(filter(is_remote, locations), None)) is not None:
        sidecar_path(remote)  # raises

    def index_one(location: str, former: ShardIndex | None, saved: bool) -> ShardIndex:
        index = index_shard(location, index_folder, store, tolerant, former, saved)
        if sized is None or (index.image_sizes is not None and index.sized_by == sized):
            return index
        from data.shards.image_sizes import with_image_sizes  # decodes headers of images, seldom needed

        index = with_image_sizes(index, sized, store)
        if saved:
            save_index(index, index_folder)
        return index

    return IndexRequest(locations, index_folder, store.stamp, index_one, tolerant, sized)


def _digest(lines: Iterable[str]) -> str:
    return hashlib.blake2b("\n".join(lines).encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
