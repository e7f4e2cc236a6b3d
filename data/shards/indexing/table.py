"""What is known of each shard of a set without looking at its samples: a row for each."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.shards.decoders import LATENT_MEMBER
from data.shards.indexing.location_list import LocationList
from data.shards.scan import SampleFault, ShardIndex

Int64Array = NDArray[np.int64]


class Kind(NamedTuple):
    """Members of a shard; usually the same for all shards of a set."""

    extensions: tuple[str, ...]
    full: tuple[str, ...]
    """Extensions that all samples have."""
    checksums: bool


@dataclass(frozen=True)
class ShardTable:
    """Columns of n shards, in order."""

    locations: Sequence[str]
    counts: Int64Array
    """(n,): samples."""
    ends: Int64Array
    """(n,): end of the last member in bytes."""
    fingerprints: NDArray[np.uint8]
    """(n, 16)."""
    kinds: tuple[Kind, ...]
    kind_of: NDArray[np.int32]
    """(n,): index into `kinds`."""
    faults: tuple[tuple[int, SampleFault], ...]
    """Number of a shard and a fault of it, by shard."""
    latent_sizes: Int64Array
    """(m, 3): shard, size in bytes of the latents member, number of samples with it; size 0 for shards without latents."""
    image_sizes: NDArray[np.integer[Any]] | None
    """(samples, 2): heights and widths; None unless known for every shard."""
    sized_by: str
    """What `image_sizes` measures; "" without it."""

    @classmethod
    def of(cls, indexes: Sequence[ShardIndex]) -> "ShardTable":
        """The table of indexes in memory."""
        kinds: dict[Kind, int] = {}
        kind_of = [kinds.setdefault(_kind(index), len(kinds)) for index in indexes]
        sized_by = {index.sized_by if index.image_sizes is not None else "" for index in indexes}
        sizes = [index.image_sizes for index in indexes if index.image_sizes is not None]
        sized = len(sized_by) == 1 and len(sizes) == len(indexes)
        prints = b"".join(bytes.fromhex(index.fingerprint) for index in indexes)
        return cls(
            locations=tuple(index.location for index in indexes),
            counts=np.array([len(index) for index in indexes], dtype=np.int64),
            ends=np.array([_end(index) for index in indexes], dtype=np.int64),
            fingerprints=np.frombuffer(prints, dtype=np.uint8).reshape(-1, 16),
            kinds=tuple(kinds),
            kind_of=np.array(kind_of, dtype=np.int32),
            faults=tuple((number, fault) for number, index in enumerate(indexes) for fault in index.faults),
            latent_sizes=np.concatenate(
                [
                    np.empty((0, 3), dtype=np.int64),
                    *(_latent_sizes(number, index) for number, index in enumerate(indexes)),
                ]
            ),
            image_sizes=np.concatenate(sizes) if sized else None,
            sized_by=sized_by.pop() if sized else "",
        )

    @classmethod
    def joined(cls, tables: Sequence["ShardTable"]) -> "ShardTable":
        """The rows of several tables, one after another."""
        if len(tables) == 1:
            return tables[0]
        kinds: dict[Kind, int] = {}
        numbers = [
            np.array([kinds.setdefault(kind, len(kinds)) for kind in one.kinds], dtype=np.int32)
            for one in tables
        ]
        lengths = [len(one.locations) for one in tables]
        firsts = (np.cumsum(lengths) - lengths).tolist()
        sizes = [one.image_sizes for one in tables if one.image_sizes is not None]
        sized = len(sizes) == len(tables) and len({one.sized_by for one in tables}) == 1
        return cls(
            locations=LocationList.joined([one.locations for one in tables]),
            counts=np.concatenate([one.counts for one in tables]),
            ends=np.concatenate([one.ends for one in tables]),
            fingerprints=np.concatenate([one.fingerprints for one in tables]),
            kinds=tuple(kinds),
            kind_of=np.concatenate([own[one.kind_of] for own, one in zip(numbers, tables, strict=True)]),
            faults=tuple(
                (first + number, fault)
                for first, one in zip(firsts, tables, strict=True)
                for number, fault in one.faults
            ),
            latent_sizes=np.concatenate(
                [
                    one.latent_sizes + np.array([first, 0, 0])
                    for first, one in zip(firsts, tables, strict=True)
                ]
            ),
            image_sizes=np.concatenate(sizes) if sized else None,
            sized_by=tables[0].sized_by if sized else "",
        )

    @cached_property
    def firsts(self) -> Int64Array:
        """(n,): number of the first sample of each shard."""
        firsts: Int64Array = np.cumsum(self.counts) - self.counts
        return firsts

    def without(self, members: Sequence[Sequence[str]]) -> list[int]:
        """Shards of which a sample may lack a part.

        Args:
            members: for each part, the members that can contain it.
        """
        lacking = [not all(set(part) & set(kind.full) for part in members) for kind in self.kinds]
        found: list[int] = np.flatnonzero(np.array(lacking, dtype=bool)[self.kind_of]).tolist()
        return found

    def samples_of_latent_size(self) -> tuple[int, Int64Array, Int64Array]:
        """The most common size in bytes of latents, and how many samples have it: the shards, and the number in each.

        A shard without latents counts with size 0.
        """
        values, inverse = np.unique(self.latent_sizes[:, 1], return_inverse=True)
        counts = np.zeros(len(values), dtype=np.int64)
        np.add.at(counts, inverse.reshape(-1), self.latent_sizes[:, 2])
        if not values.size:
            return 0, np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        usual = int(values[counts.argmax()])
        rows = self.latent_sizes[self.latent_sizes[:, 1] == usual]
        return usual, rows[:, 0], rows[:, 2]


def _kind(index: ShardIndex) -> Kind:
    present: list[bool] = np.asarray((index.offsets >= 0).all(axis=0)).tolist()
    full = tuple(name for name, every in zip(index.extensions, present, strict=True) if every)
    return Kind(index.extensions, full, index.checksums is not None)


def _end(index: ShardIndex) -> int:
    return int((index.offsets + index.sizes).max()) if index.offsets.size else 0


def _latent_sizes(number: int, index: ShardIndex) -> Int64Array:
    column = index.column(LATENT_MEMBER)
    if column is None:
        values, counts = np.zeros(1, dtype=np.int64), np.array([len(index)])
    else:
        sizes = index.sizes[:, column]
        values, counts = np.unique(sizes[sizes >= 0], return_counts=True)
    used = counts > 0
    return np.column_stack([np.full(int(used.sum()), number), values[used], counts[used]]).astype(np.int64)
