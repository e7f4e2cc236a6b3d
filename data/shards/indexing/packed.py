"""The indexes of all shards of a set in one file, mapped into memory.

The byte ranges and keys of a shard are one segment of the file, of which only the pages in use are in memory, once for all
processes of a node. A checksum covers the columns of `ShardTable`, which decide the order of the samples, and another one each
segment, compared when the shard is first read.
"""

import mmap
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.shards.indexing.on_demand import OnDemand
from data.shards.indexing.packed_file import PackedTable, read_packed, segment_of, write_packed
from data.shards.indexing.table import ShardTable
from data.shards.locations import Stamp
from data.shards.scan import ShardIndex
from data.shards.sidecar import makes_sense
from data.shards.tar_headers import BrokenShardError

GONE = Stamp(-3, 0)
"""State of a shard that could not be accessed when it was indexed."""
_KEPT_SHARDS = 256
_COPY_BYTES = 1 << 24


class PackedIndexes(OnDemand[ShardIndex]):
    """The indexes of a packed file; each is made when it is asked for.

    Args:
        path: the file.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is not a complete packed index.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with open(path, "rb") as stream:
            self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        self.columns, self._segments, self.sum = read_packed(self._map)
        self._made: OrderedDict[int, ShardIndex] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the path: another process maps the file itself."""
        return _reopened, (self.path, self.sum)

    @property
    def table(self) -> ShardTable:
        return self.columns.table

    @property
    def linked(self) -> NDArray[np.uint8]:
        """Whether each shard is a symbolic link."""
        return self.columns.linked

    def __len__(self) -> int:
        """Shards."""
        return len(self.table.locations)

    def item(self, number: int) -> ShardIndex:
        """The index of a shard.

        Raises:
            BrokenShardError: if its part of the file was damaged.
        """
        if (found := self._made.get(number)) is None:
            found = self._made[number] = self._make(number)
            while len(self._made) > _KEPT_SHARDS:
                self._made.popitem(last=False)
        return found

    def state(self, number: int) -> Stamp:
        """Stamp of a shard when it was indexed."""
        return Stamp(*self.columns.states[number].tolist())

    def states(self) -> list[Stamp]:
        """`state` of every shard."""
        return [Stamp(*state) for state in self.columns.states.tolist()]

    def is_intact(self) -> bool:
        """Whether the checksum of every segment is right."""
        ends, sums = self.columns.segment_ends.tolist(), self.columns.segment_sums.tolist()
        return all(
            zlib.crc32(self._segments[start:end].data) == known
            for (start, end), known in zip(pairwise([0, *ends]), sums, strict=True)
        )

    def segments(self) -> Iterator[memoryview]:
        """All bytes of the segments, in parts."""
        for start in range(0, len(self._segments), _COPY_BYTES):
            yield self._segments[start : start + _COPY_BYTES].data

    def _make(self, number: int) -> ShardIndex:
        table, columns = self.table, self.columns
        start = int(columns.segment_ends[number - 1]) if number else 0
        segment = self._segments[start : int(columns.segment_ends[number])]
        if zlib.crc32(segment.data) != columns.segment_sums[number]:
            raise self._damaged(number)
        kind, rows = table.kinds[table.kind_of[number]], int(table.counts[number])
        cells = rows * len(kind.extensions)
        at = 0
        parts: list[Any] = []
        for count, dtype in (
            (cells, np.int64),
            (cells, np.int64),
            (rows, np.int64),
            (cells if kind.checksums else 0, np.uint32),
        ):
            parts.append(np.frombuffer(segment, dtype, count, at) if count else np.empty(0, dtype))
            at += count * np.dtype(dtype).itemsize
        offsets, sizes, key_ends, checksums = parts
        length = int(key_ends[-1]) if rows else 0
        shape = (rows, len(kind.extensions))
        first, sized = int(table.firsts[number]), table.image_sizes
        state = self.state(number)
        index = ShardIndex(
            location=table.locations[number],
            extensions=kind.extensions,
            offsets=offsets.reshape(shape),
            sizes=sizes.reshape(shape),
            keys=np.frombuffer(segment, np.uint8, length, at) if length else np.empty(0, np.uint8),
            key_ends=key_ends,
            fingerprint=table.fingerprints[number].tobytes().hex(),
            faults=tuple(fault for of, fault in table.faults if of == number),
            checksums=checksums.reshape(shape) if kind.checksums else None,
            image_sizes=None if sized is None else sized[first : first + rows].astype(np.int64),
            sized_by=table.sized_by,
            stamp=state if columns.stamped[number] else None,
        )
        if not makes_sense(index if index.stamp is not None else replace(index, stamp=Stamp(-1, 0))):
            raise self._damaged(number)
        return index

    def _damaged(self, number: int) -> BrokenShardError:
        return BrokenShardError(
            f"The index of {self.table.locations[number]} in {self.path} was damaged on this disk; remove that file and start "
            "again, which writes it anew."
        )


def pack(path: Path, indexes: Sequence[ShardIndex], states: Sequence[Stamp]) -> None:
    """Writes the indexes of some shards, to be merged; arguments as for `PackedTable.of`."""
    write_packed(path, PackedTable.of(indexes, states), map(segment_of, indexes), lasting=False)


def merge(path: Path, parts: Sequence[PackedIndexes]) -> None:
    """Writes the indexes of several packed files to one, in order."""
    columns = PackedTable.joined([part.columns for part in parts])
    write_packed(path, columns, chain.from_iterable(part.segments() for part in parts))


def _reopened(path: Path, expected: str) -> PackedIndexes:
    found = PackedIndexes(path)
    if found.sum != expected:
        raise BrokenShardError(f"The index {path} was replaced while the run started; start again.")
    return found
