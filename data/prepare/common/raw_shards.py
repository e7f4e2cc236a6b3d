"""The members of samples in shards as they are, undecoded, by their number in stored order."""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate
from typing import NamedTuple

from data.shards.index import ShardIndex, ShardSet
from data.shards.store import ShardStore
from data.shards.tar_headers import BrokenShardError


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
        store: how it is reached.
    """

    def __init__(self, index: ShardIndex, store: ShardStore) -> None:
        self.index, self._store = index, store

    def __enter__(self) -> RawShard:
        """Open."""
        self._file = self._store.open(self.index.location)
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self._file.close()

    def __len__(self) -> int:
        """Samples in it."""
        return len(self.index)

    def sample(self, row: int) -> RawSample:
        """A sample.

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
    """All samples of several shards, one after another; one file is open at a time.

    Args:
        shards: their index.
        store: how they are reached.
    """

    def __init__(self, shards: ShardSet, store: ShardStore) -> None:
        self._shards, self._store = shards, store
        self._ends = list(accumulate(shards.sizes))
        self._open: tuple[int, RawShard] | None = None

    def __len__(self) -> int:
        """Samples in all."""
        return self._ends[-1]

    def sample(self, number: int) -> RawSample:
        """A sample by its number in stored order; neighbours are cheap."""
        shard = bisect_right(self._ends, number)
        if self._open is None or self._open[0] != shard:
            self.close()
            self._open = shard, RawShard(self._shards.shards[shard], self._store).__enter__()
        return self._open[1].sample(number - (self._ends[shard - 1] if shard else 0))

    def close(self) -> None:
        """Close the file that is open."""
        if self._open is not None:
            self._open[1].__exit__()
            self._open = None
