"""Fetches remote shards in the background: those that are being read, then those that will be."""

import itertools
import logging
import os
import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from data.shards.locations import Stamp
from data.shards.order.buckets import AnyOrder, BucketOrder
from data.shards.order.sample_order import Int64Array
from data.shards.tar_headers import BrokenShardError

_log = logging.getLogger(__name__)
_THREADS = 2
_STEP, _STEPS_AT_ONCE = 2048, 8  # positions that are planned together, and per batch: 20 ms at most


class Fetcher:
    """Threads that fetch shards in the order of their urgency.

    Args:
        fetch: fetches one shard in a state.
    """

    def __init__(self, fetch: Callable[[str, Stamp], object]) -> None:
        self._fetch = fetch
        self._wanted: queue.PriorityQueue[tuple[int, int, str, Stamp]] | None = None
        self._numbers = itertools.count()
        self._process = -1

    def __getstate__(self) -> dict[str, Any]:
        """State without the threads, which cannot be pickled."""
        return self.__dict__ | {"_wanted": None, "_process": -1, "_numbers": itertools.count()}

    def want(self, location: str, stamp: Stamp, ahead: bool = False) -> None:
        """Fetch a shard soon.

        Args:
            location: a URL, or `pipe:` with a command.
            stamp: its state.
            ahead: whether it is not being read yet, so that others go first.
        """
        if self._wanted is None or self._process != os.getpid():  # threads are not inherited by a fork
            self._wanted, self._process = queue.PriorityQueue(), os.getpid()
            for _ in range(_THREADS):
                threading.Thread(target=self._work, args=(self._wanted,), daemon=True).start()
        self._wanted.put((int(ahead), next(self._numbers), location, stamp))

    def _work(self, wanted: "queue.PriorityQueue[tuple[int, int, str, Stamp]]") -> None:
        while True:
            _, _, location, stamp = wanted.get()
            try:
                self._fetch(location, stamp)
            except (OSError, BrokenShardError) as error:
                # Tried again, and reported, when the shard is read.
                _log.info("'%s' was not fetched into the cache (%s).", location, error)


class UpcomingShards:
    """Tells which shards the next positions need.

    Args:
        order: of the run.
        first_samples: (shards,), number of the first sample of each shard.
        shard_bytes: (shards,), bytes of the cache that each takes; 0 for those that are not fetched.
        ahead: positions to look ahead.
        limit_bytes: of the shards in use and those that were told, together.
    """

    def __init__(
        self,
        order: AnyOrder | BucketOrder,
        first_samples: Int64Array,
        shard_bytes: Int64Array,
        ahead: int,
        limit_bytes: int,
    ) -> None:
        self._order, self._first_samples, self._bytes = order, first_samples, shard_bytes
        self._ahead, self._limit_bytes = ahead, limit_bytes
        self._planned, self._used = 0, 0
        self._last_uses: OrderedDict[int, int] = OrderedDict()

    def at(self, positions: Sequence[int]) -> list[int]:
        """Shards that are needed from these positions on and were not told before, in the order of their first use."""
        low, high = min(positions), max(positions)
        if not low <= self._planned <= high + 1 + self._ahead + _STEP:
            self._planned, self._used = low, 0  # another place of the run
            self._last_uses.clear()
        for shard in [shard for shard, last in self._last_uses.items() if last < low]:
            del self._last_uses[shard]
            self._used -= int(self._bytes[shard])
        told: list[int] = []
        for _ in range(_STEPS_AT_ONCE):
            if self._planned > high + self._ahead or not self._plan_step(told):
                break
        return told

    def _plan_step(self, told: list[int]) -> bool:
        """Plan the next positions; False if there is no room for a shard of theirs."""
        samples = self._order.samples_at(range(self._planned, self._planned + _STEP))
        shards = np.searchsorted(self._first_samples, samples, side="right") - 1
        found, firsts = np.unique(shards, return_index=True)
        lasts = _STEP - 1 - np.unique(shards[::-1], return_index=True)[1]
        for place in np.argsort(firsts).tolist():
            shard, last = int(found[place]), self._planned + int(lasts[place])
            size = int(self._bytes[shard])
            if not size:
                continue
            if shard not in self._last_uses:
                if self._used + size > self._limit_bytes:
                    return False
                self._used += size
                told.append(shard)
            self._last_uses[shard] = last
        self._planned += _STEP
        return True
