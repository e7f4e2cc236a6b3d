"""Reads samples by position: one read covers all members of a sample, then each is decoded."""

from __future__ import annotations

import zlib
from array import array
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from data.shards.collate import collate
from data.shards.decoders import LATENT_MEMBER, BadSampleError
from data.shards.faults import Quarantine, UnreadableBatch
from data.shards.images import fast_jpeg_decoder
from data.shards.index import ShardIndex, ShardSet
from data.shards.layout import (
    CONTENTS,
    Content,
    EmptyCaptions,
    incomplete_samples,
    missing_member,
    sample_rows,
)
from data.shards.order.buckets import AnyOrder, BucketOrder
from data.shards.remote.fetching import UpcomingShards
from data.shards.remote.shard_file import ShardFile
from data.shards.sample_decoder import Reading, SampleDecoder
from data.shards.store import Arena, ShardStore
from data.shards.tar_headers import BrokenShardError
from sdxs_lightning.core.batch import TrainingBatch
from sdxs_lightning.core.errors import UserError
from sdxs_lightning.core.image_condition import ImageCondition

__all__ = ["Content", "EmptyCaptions", "Reading", "ShardDataset"]
_OPEN_SHARDS = 128
_REPLACEMENTS = 100  # attempts for one position before the shards count as unreadable
_MAX_SAMPLE_BYTES = 1 << 29  # sizes in headers are untrusted
_PROBES = 7  # samples that determine the shape of the set


@dataclass(frozen=True)
class _OpenShard:
    """An open file, and where to read each of its samples, as `sample_rows` returns it."""

    file: ShardFile
    rows: NDArray[np.int64]


class ShardDataset(Dataset[TrainingBatch | UnreadableBatch]):
    """Map-style dataset of batches by position: `dataset.batch([p0, p1, ...])` is a `TrainingBatch`.

    Indexed by a sequence of positions, so that a DataLoader without automatic batching sends positions to its workers and
    gets batches back.
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
        upcoming: UpcomingShards | None = None,
    ) -> None:
        """Check, from the index alone, that every sample has the required members.

        Args:
            shards: the index.
            order: maps positions to samples.
            contents: contents of a batch in addition to captions; () reads captions alone.
            resolution: as in `Reading`.
            empty_captions: as in `Reading`.
            condition: as in `Reading`.
            reading: all decoding settings, in place of the three before it.
            store: access to remote shards.
            quarantine: records bad samples, which are then replaced; None raises at the first one.
            upcoming: remote shards to fetch before they are read.

        Raises:
            BadSampleError: naming shard and key, if a sample has no member for a content or for the caption.
            TooManyFaultsError: with a quarantine, if these exceed its budget.
            ValueError: for an unknown content.
        """
        unknown = sorted(set(contents) - set(CONTENTS))
        if unknown:
            raise ValueError(
                f"data.contents is {list(contents)}, but it accepts latents, images, control_images, noise_seeds "
                "and sizes."
            )
        self.shards, self.order, self.contents = shards, order, tuple(contents)
        self.reading = reading or Reading(
            resolution=resolution, empty_captions=empty_captions, condition=condition
        )
        self._store, self._quarantine = store or ShardStore(), quarantine
        self._upcoming = upcoming
        self._decoder = SampleDecoder(self.contents, self.reading)
        self._parts = self._decoder.parts
        self._first_samples = array("q", shards.table.firsts.tobytes())  # searched without an object for each
        self._names = shards.names()
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._arena = Arena()
        self._shapes: dict[str, tuple[tuple[int, ...], str]] | None = None
        if {"images", "control_images"} & set(contents):
            fast_jpeg_decoder()  # loaded once here rather than in each worker
        self._check_index()

    def __len__(self) -> int:
        """Samples in an epoch."""
        return len(self.order)

    def __getitem__(self, positions: Sequence[int]) -> TrainingBatch | UnreadableBatch:
        """Like `batch`, but returns data errors for the main process to raise."""
        try:
            return self.batch(positions)
        except (UserError, BadSampleError, BrokenShardError, OSError, MemoryError) as error:
            return UnreadableBatch(error)

    def batch(self, positions: Sequence[int]) -> TrainingBatch:
        """The samples at these positions.

        Raises:
            BadSampleError: if a member cannot be decoded, a caption is empty and not allowed to be, or sizes differ.
            BrokenShardError: if a shard is shorter than in its index.
            OSError: if a shard cannot be read.
            TooManyFaultsError: with a quarantine, instead of the others, beyond its budget.
        """
        samples = self.order.samples_at(positions)
        for number in self._upcoming.at(positions) if self._upcoming is not None else ():
            index = self.shards.shards[number]
            self._store.fetch_ahead(index.location, index.stamp)
        self._arena.clear()
        read = [self._read(*pair) for pair in zip(samples.tolist(), positions, strict=True)]
        return collate(read, positions)  # copies, so no memory of the arena escapes

    def captions(self, count: int) -> list[str]:
        """Captions of the first `count` samples in stored order, or of all if there are fewer."""
        self._arena.clear()
        return [self._read(sample, sample)["captions"] for sample in range(min(count, len(self)))]

    def raw(self, positions: Sequence[int]) -> list[list[memoryview]]:
        """The undecoded members of the samples at these positions: the caption's, then those of `contents`.

        Valid until further samples are read.
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
        """State without open files, which cannot be pickled."""
        return self.__dict__ | {"_open": OrderedDict()}

    def _check_index(self) -> None:
        table = self.shards.table
        # All samples of the other shards have all members, which is known without looking at them.
        looked_at = {
            *table.without([part.members for part in self._parts]),
            *(number for number, _ in table.faults),
        }
        complete = int(table.counts.sum()) - sum(int(table.counts[number]) for number in looked_at)
        for number in sorted(looked_at):
            index = self.shards.shards[number]
            rows = incomplete_samples(index, self._parts)
            complete += len(index) - rows.size
            if self._quarantine is None and rows.size:
                raise missing_member(index, self._parts, int(rows[0]))
            if self._quarantine is None:
                index.require_complete()
                continue
            for fault in index.faults:
                self._quarantine.record(index.location, fault.key, fault.reason)
            for row in rows.tolist():
                error = missing_member(index, self._parts, row)
                self._quarantine.record(index.location, index.key(row), str(error))
        if table.counts.any() and not complete:  # no budget makes a run of this
            first = self.shards.shards[int(np.flatnonzero(table.counts)[0])]
            raise missing_member(first, self._parts, int(incomplete_samples(first, self._parts)[0]))

    def _read(self, sample: int, position: int) -> dict[str, Any]:
        """One sample by its number in stored order, or its replacement."""
        chosen, reason = sample, ""
        for attempt in range(_REPLACEMENTS):
            try:
                decoded = self._decoded(chosen, position)
                self._check_shapes(decoded, chosen)
                return decoded
            except (BadSampleError, BrokenShardError, OSError) as error:
                if self._quarantine is None:
                    raise
                number, row = self._place(chosen)
                index = self.shards.shards[number]
                reason = str(error)
                self._quarantine.record(index.location, index.key(row), reason)
            chosen = self.order.replacement(sample, attempt)
        raise UserError(
            f"{_REPLACEMENTS} samples that could replace one that cannot be read cannot be read either (the last: {reason}); "
            "is the storage of data.shards reachable?"
        )

    def _check_shapes(self, decoded: dict[str, Any], sample: int) -> None:
        """Check that the sample has the shape of the set, so that a replacement can be drawn before batching.

        Without a quarantine the first batch of mixed shapes stops the run and names two samples.
        """
        if self._quarantine is None:
            return
        if self._shapes is None:
            self._shapes = self._probe_shapes()
        for content, (shape, example) in self._shapes.items():
            if content == "latents" and self.reading.latent_sizes is not None:
                shape = (shape[0], *self.reading.latent_sizes[sample].tolist())
            if decoded[content].shape != shape:
                raise BadSampleError(
                    f"{self._where(*self._place(sample))}: its {content} are {decoded[content].shape}, but those of the set "
                    f"are {shape} (as of {example}); set data.resolution or data.buckets, or write shards of one size."
                )

    def _probe_shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """For each fixed-size content, the most common shape among a few samples of the set, and the id of one of them."""
        fitted = self.reading.resolution is not None or self.reading.sizes is not None
        found: dict[str, tuple[tuple[int, ...], str]] = {}
        for content in {"latents", "images", "control_images"} & set(self.contents):
            if fitted and content != "latents":
                continue
            decoded: list[tuple[tuple[int, ...], str]] = []
            for sample in self._typical_samples(content):
                try:
                    one = self._decoded(sample, sample)
                except (BadSampleError, BrokenShardError, OSError):
                    continue  # counted when its position is read
                decoded.append((one[content].shape, one["id"]))
            if decoded:
                shape = Counter(shape for shape, _ in decoded).most_common(1)[0][0]
                found[content] = next(one for one in decoded if one[0] == shape)
        return found

    def _typical_samples(self, content: str) -> list[int]:
        """A few samples spread over the set; for latents, those whose members have the most common size."""
        table = self.shards.table
        if content != "latents":
            total = int(table.counts.sum())
            return [round(place) for place in np.linspace(0, total - 1, min(_PROBES, total)).tolist()]
        size, shards, counts = table.samples_of_latent_size()
        ends = np.cumsum(counts)
        if not ends.size:
            return []
        found = []
        for place in np.linspace(0, ends[-1] - 1, min(_PROBES, int(ends[-1]))).tolist():
            entry = int(np.searchsorted(ends, round(place), side="right"))
            number, nth = int(shards[entry]), round(place) - int(ends[entry] - counts[entry])
            index = self.shards.shards[number]
            column = index.column(LATENT_MEMBER)
            rows = np.arange(len(index)) if column is None else np.flatnonzero(index.sizes[:, column] == size)
            found.append(self._first_samples[number] + int(rows[nth]))
        return found

    def _place(self, sample: int) -> tuple[int, int]:
        # An empty shard begins where the next one does; "right" skips it.
        number = bisect_right(self._first_samples, sample) - 1
        return number, sample - self._first_samples[number]

    def _span(self, sample: int) -> tuple[int, int, list[memoryview], list[int]]:
        """Shard, row, and for each part its bytes and its column in the index."""
        number, row = self._place(sample)
        shard = self._shard(number)
        start, length, *members = shard.rows[row].tolist()
        if start < 0:
            raise missing_member(self.shards.shards[number], self._parts, row)
        if length > _MAX_SAMPLE_BYTES:
            raise BadSampleError(
                f"{self._where(number, row)}: the sample states {length:,} bytes, more than {_MAX_SAMPLE_BYTES:,}."
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
        return f"{index.location}, key {index.key(row)!r}"

    def _shard(self, number: int) -> _OpenShard:
        if (shard := self._open.get(number)) is None:
            index = self.shards.shards[number]
            shard = _OpenShard(self._store.open(index.location, index.stamp), sample_rows(index, self._parts))
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
                f"{where}: the bytes of the member '{index.extensions[column]}' have changed since the shard was verified."
            )
