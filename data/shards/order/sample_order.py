"""The sample at each position, as a pure function of (seed, epoch, position).

There is no stored order and no generator state, so any rank and any worker can look up any position, and a run resumes from
one integer. Position p is the number of samples that the run consumed before; with n samples it is in epoch p // n at place
p % n, and each epoch visits each sample exactly once.

The shuffle is bounded: shards are dealt into windows of at most K shards, and samples are permuted within a window. Only K
shards are open at a time; with K >= the number of shards it is a full shuffle. Each window gets shards from the complete
stored order (one of each run of as many shards as there are windows), so that for a data set written in sorted order the
correlation with the stored order is about 1 / K^1.5; windows of random shards would leave about 1 / sqrt(shards).
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Int64Array = NDArray[np.int64]
_K = TypeVar("_K")
_V = TypeVar("_V")

ORDER_VERSION = 2
"""Incremented when the order of a seed changes, so that older checkpoints refuse to resume.

2: shards are dealt into windows rather than drawn. Where one window holds all shards, the order is that of 1.
"""

_MASK = (1 << 64) - 1
_ROUNDS = 8  # even, so that halves of unequal width return to their place
_BLOCK = 8192  # positions per block: vectorised arithmetic costs 0.1 us per sample instead of 5
_DRAWS = 3  # the order's own keys begin with 0, 1 and 2 after the epoch or the seed


def mix(value: int) -> int:
    """The finaliser of splitmix64, a bijection of 64-bit integers.

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def key_of(*parts: int) -> int:
    """One 64-bit key from several integers; their order matters."""
    key = 0
    for part in parts:
        key = mix(key ^ (part & _MASK))
    return key


class Draw(IntEnum):
    """Random draws at each visit of a sample. Append only: changing a value changes all runs of a seed."""

    CROP_TOP = 0
    CROP_LEFT = 1
    FLIP = 2
    CAPTION = 3


def draw(seed: int, position: int, what: Draw, count: int) -> int:
    """A uniform integer in [0, count).

    Like noise and timesteps (core/seeding.py), each draw is a function of the seed and the sample's position rather than of a
    generator state, so a resumed run draws the same.
    """
    return key_of(seed, _DRAWS, position, what) * count >> 64


def _mix_array(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _round_keys(keys: Sequence[int]) -> NDArray[np.uint64]:
    """(rounds, keys): the key of each Feistel round."""
    return np.array([[key_of(key, number) for key in keys] for number in range(_ROUNDS)], dtype=np.uint64)


def _feistel(values: NDArray[np.uint64], bits: int, round_keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A keyed bijection of [0, 2**bits), bits >= 2: Feistel rounds on bits // 2 and the rest.

    Args:
        values: (n,) or (k, n).
        bits: of the range.
        round_keys: (rounds, 1) or (rounds, n); for k permutations at once (rounds, k, 1).
    """
    left_bits, right_bits = bits // 2, bits - bits // 2
    left, right = values >> np.uint64(right_bits), values & np.uint64((1 << right_bits) - 1)
    for round_key in round_keys:
        mixed = _mix_array(right + round_key) & np.uint64((1 << left_bits) - 1)
        left, right = right, left ^ mixed
        left_bits, right_bits = right_bits, left_bits
    return (left << np.uint64(right_bits)) | right


def permute(indices: Int64Array, length: int, key: int) -> Int64Array:
    """Apply a keyed permutation of range(length) to the given indices, without storing the permutation.

    A Feistel network permutes the next power of two; values outside range(length) are permuted again until they are inside
    (cycle walking), which gives a permutation of range(length). Each round leaves at most half of them outside.

    Args:
        indices: (n,), int64, in [0, length).
        length: size of the permuted range, at least 1.
        key: 64 bits; another key gives another permutation.

    Returns:
        (n,), int64.

    Source: Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002.
    """
    return _permuted(indices[np.newaxis], length, [key]).reshape(-1)


def _permuted(indices: Int64Array, length: int, keys: Sequence[int]) -> Int64Array:
    """`permute` with a key for each row: (keys, n), int64."""
    bits, round_keys = max(2, (length - 1).bit_length()), _round_keys(keys)
    shape = len(keys), indices.shape[1]
    values = _feistel(np.broadcast_to(indices, shape).astype(np.uint64), bits, round_keys[:, :, np.newaxis])
    values = values.reshape(-1)
    outside = np.flatnonzero(values >= length)
    while outside.size:
        walked = _feistel(values[outside], bits, round_keys[:, outside // max(1, shape[1])])
        values[outside] = walked
        outside = outside[walked >= length]
    return values.reshape(shape).astype(np.int64)


@dataclass(frozen=True)
class _Epoch:
    """One epoch: shards in order, the first place of each, and the first place of each window with the end."""

    shards: Int64Array
    starts: Int64Array
    window_starts: Int64Array


class SampleOrder:
    """Maps positions to sample numbers; samples are numbered through all shards in the order of the index."""

    def __init__(self, shard_sizes: Sequence[int], seed: int = 0, shuffle_window_shards: int = 64) -> None:
        """Store the settings.

        Args:
            shard_sizes: samples in each shard, in the index's order.
            seed: seed of the order.
            shuffle_window_shards: number of shards whose samples are shuffled together; 0 keeps the stored order in
                every epoch.

        Raises:
            ValueError: for a negative window, or without any sample.
        """
        if shuffle_window_shards < 0:
            raise ValueError(
                f"shuffle_window_shards is {shuffle_window_shards}, but it is a number of shards: 1 or more, "
                "or 0 for the stored order."
            )
        self.seed = seed
        self.shuffle_window_shards = shuffle_window_shards
        self._sizes = np.asarray(shard_sizes, dtype=np.int64)
        self._first_samples = np.cumsum(self._sizes) - self._sizes
        self._total = int(self._sizes.sum())
        if self._total == 0:
            raise ValueError("The shards hold no sample, so nothing can be ordered.")
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()
        self._blocks: OrderedDict[tuple[int, int], Int64Array] = OrderedDict()

    def __len__(self) -> int:
        """Samples in one epoch."""
        return self._total

    @property
    def version(self) -> int:
        """The first ORDER_VERSION with the current order for these shards."""
        shards = np.count_nonzero(self._sizes)
        return ORDER_VERSION if 0 < self.shuffle_window_shards < shards else 1

    def replacement(self, sample: int, attempt: int) -> int:
        """The replacement of an unreadable sample; a pure function of its arguments.

        Drawn from the complete data set, because the neighbours of an unreadable sample are often unreadable too.

        Args:
            sample: number of the unreadable sample.
            attempt: 0 for the first replacement, 1 if that one is unreadable too, and so on.
        """
        step = 1 + key_of(self.seed, 2, sample, attempt) % max(1, self._total - 1)
        return (sample + step) % self._total

    def samples_at(self, positions: Sequence[int] | Int64Array) -> Int64Array:
        """Sample numbers at the given positions.

        Args:
            positions: (n,), non-negative integers, in any order and from any epoch.

        Returns:
            (n,), int64, in [0, len(self)).
        """
        if (
            isinstance(positions, list | range)
            and len(positions)
            and (found := self._neighbours(positions)) is not None
        ):
            return found
        wanted = np.asarray(positions, dtype=np.int64)
        epochs, places = np.divmod(wanted, self._total)
        blocks = places // _BLOCK
        samples = np.empty_like(wanted)
        for epoch, block in set(zip(epochs.tolist(), blocks.tolist(), strict=True)):
            chosen = (epochs == epoch) & (blocks == block)
            samples[chosen] = self._block(epoch, block)[places[chosen] - block * _BLOCK]
        return samples

    def _neighbours(self, positions: Sequence[int]) -> Int64Array | None:
        """Fast path of `samples_at` for positions within one block, as in most batches; None otherwise."""
        low, high = int(min(positions)), int(max(positions))
        epoch, place = divmod(low, self._total)
        last, block = place + high - low, place // _BLOCK
        if last >= self._total or last // _BLOCK != block:
            return None
        samples: Int64Array = self._block(epoch, block)[np.array(positions) - (low - place + block * _BLOCK)]
        return samples

    def _block(self, epoch: int, block: int) -> Int64Array:
        if (found := self._blocks.get((epoch, block))) is None:
            low, high = block * _BLOCK, min((block + 1) * _BLOCK, self._total)
            found = self._samples_between(epoch, low, high)
            _remember(self._blocks, (epoch, block), found)
        return found

    def _samples_between(self, epoch: int, low: int, high: int) -> Int64Array:
        order = self._epoch(epoch)
        places = np.arange(low, high, dtype=np.int64)
        if self.shuffle_window_shards:
            first, last = np.searchsorted(order.window_starts, [low, high - 1], side="right") - 1
            for window in range(int(first), int(last) + 1):
                start, end = int(order.window_starts[window]), int(order.window_starts[window + 1])
                here = slice(max(start, low) - low, min(end, high) - low)
                key = key_of(self.seed, epoch, 1, window)
                places[here] = start + permute(places[here] - start, end - start, key)
        slots = np.searchsorted(order.starts, places, side="right") - 1
        return self._first_samples[order.shards[slots]] + places - order.starts[slots]

    def _epoch(self, epoch: int) -> _Epoch:
        if (found := self._epochs.get(epoch)) is None:
            shards = np.flatnonzero(self._sizes)  # a shard without samples would create an empty window
            windows = [shards]
            if self.shuffle_window_shards:
                windows = _deal(shards, self.shuffle_window_shards, key_of(self.seed, epoch, 0))
            shards = np.concatenate(windows)
            sizes = self._sizes[shards]
            starts = np.cumsum(sizes) - sizes
            first = np.cumsum([0, *(len(window) for window in windows[:-1])])
            found = _Epoch(shards, starts, np.append(starts[first], self._total))
            _remember(self._epochs, epoch, found)
        return found


def _deal(shards: Int64Array, window: int, key: int) -> list[Int64Array]:
    """Deal shards into windows of at most `window`: each run of consecutive shards gives one shard to each window."""
    count = -(-len(shards) // window)
    if count == 1:
        return [shards[permute(np.arange(len(shards)), len(shards), key)]]
    runs = -(-len(shards) // count)
    lengths = np.full(runs, count)
    # The run that is too short for all windows is the middle one, which changes the window means the least.
    lengths[runs // 2] = len(shards) - count * (runs - 1)
    dealt = np.full((window, count), -1, dtype=np.int64)
    places = _permuted(np.arange(count)[np.newaxis], count, [key_of(key, run) for run in range(runs)])
    for run, members in enumerate(np.split(shards, np.cumsum(lengths)[:-1])):
        dealt[run, places[run, : len(members)]] = members
    return [column[column >= 0] for column in dealt.T]


def _remember(cache: OrderedDict[_K, _V], key: _K, value: _V, size: int = 4) -> None:
    cache[key] = value
    while len(cache) > size:
        cache.popitem(last=False)
