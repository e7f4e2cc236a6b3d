"""Opens the data sets of a run: their indexes, and which remote shards are fetched ahead."""

import math
from collections.abc import Sequence

import numpy as np

from data.shards.index import JoinedIndexes, ShardSet
from data.shards.indexing.table import Int64Array, ShardTable
from data.shards.locations import is_remote
from data.shards.order.buckets import AnyOrder, BucketOrder
from data.shards.order.mixture import Source
from data.shards.remote.fetching import UpcomingShards
from data.shards.remote.shard_cache import ShardCache
from data.shards.store import ShardStore


def open_sources(
    sources: Sequence[Source],
    index_folder: str | None,
    store: ShardStore,
    tolerant: bool,
    sized: str | None = None,
    checked: bool = False,
) -> list[ShardSet]:
    """Open the indexes of each source.

    Args:
        sources: sources of the mixture, at least one.
        index_folder: folder of the indexes; None: next to the shards.
        store: access to remote shards.
        tolerant: whether faults are listed in the indexes instead of raised.
        sized: "images" or "latents" adds their sizes; None adds none.
        checked: whether `discard_outdated` was called on this node just before, so that the shards need not be looked at.

    Raises:
        FileNotFoundError: for a source without shards.
        BrokenShardError: for a broken shard, unless tolerant.
    """
    return [ShardSet.open(source.shards, index_folder, store, tolerant, sized, checked) for source in sources]


def joined(sets: Sequence[ShardSet]) -> ShardSet:
    """All shards of all sources, source after source."""
    return sets[0] if len(sets) == 1 else ShardSet(JoinedIndexes(sets))


def require_window(cache: ShardCache, shards: ShardSet, window: int) -> None:
    """Refuse a cache that would fetch the same shards repeatedly.

    Args:
        cache: cache of remote shards.
        shards: all shards.
        window: shards per shuffle window; 0 reads them in order.

    Raises:
        ValueError: if the remote shards of one shuffle window may not fit into the cache.
    """
    sizes = _bytes_in_cache(shards.table).tolist()
    needed = sum(sorted(sizes, reverse=True)[: window or 1])
    if needed > cache.limit_bytes:
        raise ValueError(
            f"data.cache_gb is {cache.limit_bytes / 1e9:g}, but the shards of one shuffle window take up to "
            f"{needed / 1e9:.3g} GB; raise data.cache_gb or lower data.shuffle_window_shards ({window})."
        )


def upcoming_shards(
    sets: Sequence[ShardSet],
    order: AnyOrder | BucketOrder,
    cache: ShardCache | None,
    window: int,
    windows: float,
) -> UpcomingShards | None:
    """The remote shards to fetch ahead; None if there are none, or no cache.

    Args:
        sets: of the sources.
        order: of the run.
        cache: of remote shards.
        window: shards per shuffle window; 0 reads them in order.
        windows: shuffle windows to look ahead.
    """
    if cache is None or not windows:
        return None
    table = joined(sets).table
    sizes = _bytes_in_cache(table)
    if not sizes.any():
        return None
    # Positions in which every source goes through one window.
    positions = sum(max(1, window) * sum(one.sizes) / len(one.sizes) for one in sets)
    return UpcomingShards(order, table.firsts, sizes, math.ceil(windows * positions), cache.limit_bytes)


def _bytes_in_cache(table: ShardTable) -> Int64Array:
    """(shards,): size of each remote shard, 0 for local ones."""
    sizes: Int64Array = table.ends * np.array([is_remote(location) for location in table.locations])
    return sizes
