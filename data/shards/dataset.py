"""Reading samples by position: one read spans the members of a sample, then each is decoded."""

from __future__ import annotations

import zlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from data.shards.buckets import AnyOrder, BucketOrder
from data.shards.collate import collate
from data.shards.decoders import BadSampleError
from data.shards.faults import Quarantine, UnreadableBatch
from data.shards.image_condition import ImageCondition
from data.shards.images import fast_jpeg_decoder
from data.shards.index import ShardIndex, ShardSet
from data.shards.layout import CONTENTS, Content, incomplete_samples, missing_member, sample_rows
from data.shards.sample_decoder import EmptyCaptions, Reading, SampleDecoder
from data.shards.store import Arena, ShardFile, ShardStore
from data.shards.tar_headers import BrokenShardError
from sdxs_lightning.core.batch import TrainingBatch
from sdxs_lightning.core.errors import UserError

__all__ = ["Content", "EmptyCaptions", "Reading", "ShardDataset"]
_OPEN_SHARDS = 128
_REPLACEMENTS = 100  # tried for one position before the shards count as unreadable
_MAX_SAMPLE_BYTES = 1 << 30  # a size in a header may be anything


@dataclass(frozen=True)
class _OpenShard:
    """An open file, and where to read each of its samples: see `sample_rows`."""

    file: ShardFile
    rows: NDArray[np.int64]


class ShardDataset(Dataset[TrainingBatch | UnreadableBatch]):
    """Whole batches by position, map-style: `dataset.batch([p0, p1, ...])` is a `TrainingBatch`.

    As a torch Dataset its item is a sequence of positions too, so that a DataLoader without automatic
    batching hands positions to its workers and gets batches back.
    """

    def __init__(
        self,
        shards: ShardSet,
        order: AnyOrder | BucketOrder,
        contents: Sequence[Content] = ("latents",),
        resolution: int | None = None,
        empty_captions: EmptyCaptions = "refuse",
        condition: ImageCondition | None = None,
        *,
        reading: Reading | None = None,
        store: ShardStore | None = None,
        quarantine: Quarantine | None = None,
    ) -> None:
        """Check, from the index alone, that every sample has what will be read.

        Args:
            shards: the index.
            order: which sample stands at which position.
            contents: what a batch holds besides captions; nothing reads captions alone.
            resolution: see `Reading`.
            empty_captions: see `Reading`.
            condition: see `Reading`.
            reading: everything about decoding, in place of the three before it.
            store: how remote shards are reached.
            quarantine: where bad samples are written down while others take their places; None stops at one.

        Raises:
            BadSampleError: naming shard and key, if a sample has no member for a content or for the caption.
            TooManyFaultsError: with a quarantine, if there are more of these than its budget.
            ValueError: on an unknown content.
        """
        unknown = sorted(set(contents) - set(CONTENTS))
        if unknown:
            raise ValueError(
                f"data.contents is {list(contents)}, but it names latents, images, control_images, noise_seeds "
                "or sizes."
            )
        self.shards, self.order, self.contents = shards, order, tuple(contents)
        self.reading = reading or Reading(
            resolution=resolution, empty_captions=empty_captions, condition=condition
        )
        self._store, self._quarantine = store or ShardStore(), quarantine
        self._decoder = SampleDecoder(self.contents, self.reading)
        self._parts = self._decoder.parts
        self._first_samples = (np.cumsum(shards.sizes) - np.asarray(shards.sizes)).tolist()
        self._names = shards.names()
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._arena = Arena()
        if {"images", "control_images"} & set(contents):
            fast_jpeg_decoder()  # loaded here, once, rather than in each reading process
        self._check_index()

    def __len__(self) -> int:
        """Samples in an epoch."""
        return len(self.order)

    def __getitem__(self, positions: Sequence[int]) -> TrainingBatch | UnreadableBatch:
        """As `batch`, with errors about the data as a value, for the process that trains to raise."""
        try:
            return self.batch(positions)
        except (UserError, BadSampleError, BrokenShardError, OSError) as error:
            return UnreadableBatch(error)

    def batch(self, positions: Sequence[int]) -> TrainingBatch:
        """The samples at these positions.

        Raises:
            BadSampleError: if a member cannot be decoded, a caption is empty and may not be, or sizes differ.
            BrokenShardError: if a shard has become shorter than its index says.
            OSError: if a shard cannot be reached.
            TooManyFaultsError: with a quarantine, in place of the others, beyond its budget.
        """
        samples = self.order.samples_at(positions)
        self._arena.clear()
        read = [self._read(*pair) for pair in zip(samples.tolist(), positions, strict=True)]
        return collate(read, positions)  # which copies: nothing of the arena leaves

    def captions(self, count: int) -> list[str]:
        """The captions of the first `count` samples in stored order, or of all if there are fewer."""
        self._arena.clear()
        return [self._read(sample, sample)["captions"] for sample in range(min(count, len(self)))]

    def raw(self, positions: Sequence[int]) -> list[list[memoryview]]:
        """The undecoded members of the samples at these positions: of each the caption's, then those of `contents`.

        They are valid until the next samples are read.
        """
        self._arena.clear()
        return [self._span(sample)[2] for sample in self.order.samples_at(positions).tolist()]

    def close(self) -> None:
        """Close the shards that are open."""
        for shard in self._open.values():
            shard.file.close()
        self._open.clear()

    def __del__(self) -> None:
        """Close the shards that are open."""
        if hasattr(self, "_open"):
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        """Without open files, which another process cannot use."""
        return self.__dict__ | {"_open": OrderedDict()}

    def _check_index(self) -> None:
        for index in self.shards.shards:
            rows = incomplete_samples(index, self._parts)
            if self._quarantine is None and rows.size:
                raise missing_member(index, self._parts, int(rows[0]))
            if self._quarantine is None:
                index.require_whole()
                continue
            for fault in index.faults:
                self._quarantine.record(index.location, fault.key, fault.reason)
            for row in rows.tolist():
                error = missing_member(index, self._parts, row)
                self._quarantine.record(index.location, index.key(row), str(error))

    def _read(self, sample: int, position: int) -> dict[str, Any]:
        """One sample by its number in stored order, or the one that stands in for it."""
        chosen = sample
        for attempt in range(_REPLACEMENTS):
            try:
                return self._decoded(chosen, position)
            except (BadSampleError, BrokenShardError, OSError) as error:
                if self._quarantine is None:
                    raise
                number, row = self._place(chosen)
                index = self.shards.shards[number]
                self._quarantine.record(index.location, index.key(row), str(error))
            chosen = self.order.replacement(sample, attempt)
        raise UserError(
            f"{_REPLACEMENTS} samples that could stand in for one that cannot be read cannot be read either; is the storage "
            "of data.shards reachable?"
        )

    def _place(self, sample: int) -> tuple[int, int]:
        # An empty shard begins where the next one does; "right" passes over it.
        number = bisect_right(self._first_samples, sample) - 1
        return number, sample - self._first_samples[number]

    def _span(self, sample: int) -> tuple[int, int, list[memoryview], list[int]]:
        """Shard, row, the bytes of each part, and its column in the index."""
        number, row = self._place(sample)
        shard = self._shard(number)
        start, length, *members = shard.rows[row].tolist()
        if start < 0:
            raise missing_member(self.shards.shards[number], self._parts, row)
        if length > _MAX_SAMPLE_BYTES:
            raise BadSampleError(
                f"{self._where(number, row)}: the sample claims {length:,} bytes, more than {_MAX_SAMPLE_BYTES:,}."
            )
        span = self._arena.take(length)
        if shard.file.read_into(span, start) != length:
            index = self.shards.shards[number]
            raise BrokenShardError(
                f"{index.location} ends before its sample '{index.key(row)}' does: it changed while it was "
                "being read; write or copy it again."
            )
        places = zip(members[::3], members[1::3], strict=True)
        parts = [span[begin : begin + size] for begin, size in places]
        return number, row, parts, members[2::3]

    def _where(self, number: int, row: int) -> str:
        index = self.shards.shards[number]
        return f"{index.location}, key '{index.key(row)}'"

    def _shard(self, number: int) -> _OpenShard:
        if (shard := self._open.get(number)) is None:
            index = self.shards.shards[number]
            shard = _OpenShard(self._store.open(index.location), sample_rows(index, self._parts))
            if len(self._open) >= _OPEN_SHARDS:
                self._open.popitem(last=False)[1].file.close()
            self._open[number] = shard
        else:
            self._open.move_to_end(number)
        return shard

    def _decoded(self, sample: int, position: int) -> dict[str, Any]:
        number, row, members, columns = self._span(sample)
        index = self.shards.shards[number]
        where = self._where(number, row)
        if index.checksums is not None:
            _check(index, row, members, columns, where)
        extensions = [index.extensions[column] for column in columns]
        decoded = self._decoder.decode(extensions, members, sample, position, where)
        return decoded | {"id": f"{self._names[number]}/{index.key(row)}"}


def _check(
    index: ShardIndex, row: int, members: Sequence[memoryview], columns: Sequence[int], where: str
) -> None:
    assert index.checksums is not None
    for content, column in zip(members, columns, strict=True):
        if zlib.crc32(content) != index.checksums[row, column]:
            raise BadSampleError(
                f"{where}: the member '{index.extensions[column]}' has other bytes than when the shard was verified."
            )
