"""Samples of shards as undecoded members, by their number in stored order."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from data.prepare.common.options import RemoteOptions
from data.shards.index import ShardIndex, ShardSet
from data.shards.remote.shard_cache import ShardCache
from data.shards.store import ShardStore
from data.shards.tar_headers import BrokenShardError


def shard_store(remote: RemoteOptions) -> ShardStore:
    """Opens shards, through the cache if there is one."""
    folder, patience = remote.cache_folder, remote.patience
    return ShardStore(None if folder is None else ShardCache(folder, remote.cache_gb, patience), patience)


def open_shards(shards: str | Sequence[str], remote: RemoteOptions) -> ShardSet:
    """The index of shards; raises as `ShardSet.open`, and UserError for a command that is not trusted."""
    remote.check_locations(shards)
    return ShardSet.open(shards, remote.indexes, shard_store(remote))


class RawSample(NamedTuple):
    """One sample of a shard."""

    key: str
    where: str
    """Shard and key, for messages."""
    members: dict[str, bytes]


class RawShard:
    """One shard; a context manager that holds its file open.

    Args:
        index: of the shard.
        store: opens it.
    """

    def __init__(self, index: ShardIndex, store: ShardStore) -> None:
        self.index, self._store = index, store

    def __enter__(self) -> RawShard:
        self._file = self._store.open(self.index.location)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self.index)

    def sample(self, row: int) -> RawSample:
        """One sample.

        Raises:
            BrokenShardError: if the file has become shorter than its index says.
        """
        index = self.index
        key = index.key(row)
        where = f"{index.location}, key '{key}'"
        members = {}
        for extension, offset, size in zip(
            index.extensions, index.offsets[row].tolist(), index.sizes[row].tolist(), strict=True
        ):
            if offset < 0:
                continue
            members[extension] = bytes(self._file.read(offset, size))
            if len(members[extension]) != size:
                raise BrokenShardError(f"{where}: the shard ends inside this sample; write or copy it again.")
        return RawSample(key, where, members)


class RawShards:
    """All samples of several shards, concatenated; one file is open at a time.

    Args:
        shards: their index.
        store: opens them.
    """

    def __init__(self, shards: ShardSet, store: ShardStore) -> None:
        self._shards, self._store = shards, store
        self._ends = list(accumulate(shards.sizes))
        self._open: tuple[int, RawShard] | None = None

    def __len__(self) -> int:
        return self._ends[-1]

    def sample(self, number: int) -> RawSample:
        """A sample by its number in stored order; access in order opens each file once."""
        shard = bisect_right(self._ends, number)
        if self._open is None or self._open[0] != shard:
            self.close()
            self._open = shard, RawShard(self._shards.shards[shard], self._store).__enter__()
        return self._open[1].sample(number - (self._ends[shard - 1] if shard else 0))

    def close(self) -> None:
        """Closes the open file."""
        if self._open is not None:
            self._open[1].__exit__()
            self._open = None
