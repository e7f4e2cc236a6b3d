"""Opens the data sets of a run: indexes, and image sizes for buckets."""

from collections.abc import Sequence

from data.shards.image_sizes import with_image_sizes
from data.shards.index import ShardSet, save_index
from data.shards.locations import is_remote
from data.shards.order.mixture import Source
from data.shards.scan import ShardIndex
from data.shards.shard_cache import ShardCache
from data.shards.store import ShardStore


def open_sources(
    sources: Sequence[Source],
    index_folder: str | None,
    store: ShardStore,
    tolerant: bool,
    sized: str | None = None,
) -> list[ShardSet]:
    """Open the indexes of each source.

    Args:
        sources: sources of the mixture, at least one.
        index_folder: folder of the indexes; None: next to the shards.
        store: access to remote shards.
        tolerant: whether faults are listed in the indexes instead of raised.
        sized: "images" or "latents" adds their sizes; None adds none.

    Raises:
        FileNotFoundError: for a source without shards.
        BrokenShardError: for a broken shard, unless tolerant.
    """
    sets = [ShardSet.open(source.shards, index_folder, store, tolerant) for source in sources]
    if sized is None:
        return sets
    return [
        ShardSet(tuple(_sized(index, sized, index_folder, store) for index in found.shards)) for found in sets
    ]


def joined(sets: Sequence[ShardSet]) -> ShardSet:
    """All shards of all sources, source after source."""
    return ShardSet(tuple(index for found in sets for index in found.shards))


def require_window(cache: ShardCache, shards: ShardSet, window: int) -> None:
    """Refuse a cache that would fetch the same shards repeatedly.

    Args:
        cache: cache of remote shards.
        shards: all shards.
        window: shards per shuffle window; 0 reads them in order.

    Raises:
        ValueError: if the remote shards of one shuffle window may not fit into the cache.
    """
    sizes = [
        int((index.offsets + index.sizes).max())
        for index in shards.shards
        if is_remote(index.location) and index.offsets.size
    ]
    needed = sum(sorted(sizes, reverse=True)[: window or 1])
    if needed > cache.limit_bytes:
        raise ValueError(
            f"data.cache_gb is {cache.limit_bytes / 1e9:g}, but the shards of one shuffle window take up to "
            f"{needed / 1e9:.3g} GB; raise data.cache_gb or lower data.shuffle_window_shards ({window})."
        )


def _sized(index: ShardIndex, content: str, index_folder: str | None, store: ShardStore) -> ShardIndex:
    if index.image_sizes is not None and index.sized_by == content:
        return index
    index = with_image_sizes(index, content, store)
    save_index(index, index_folder)
    return index
