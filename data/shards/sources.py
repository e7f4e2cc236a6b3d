"""Opening the data sets of a run: their indexes, and for buckets the sizes of their pictures."""

import contextlib
from collections.abc import Sequence

from data.shards.image_sizes import with_image_sizes
from data.shards.index import ShardSet, save_index
from data.shards.mixture import Source
from data.shards.scan import ShardIndex
from data.shards.store import ShardStore


def open_sources(
    sources: Sequence[Source],
    index_folder: str | None,
    store: ShardStore,
    tolerant: bool,
    sized: str | None = None,
) -> list[ShardSet]:
    """The indexes of each source.

    Args:
        sources: of the mixture, at least one.
        index_folder: where indexes are kept if not beside the shards.
        store: how remote shards are reached.
        tolerant: faults stand in the indexes instead of being raised.
        sized: "images" or "latents", to have their sizes; None for no sizes.

    Raises:
        FileNotFoundError: for a source without shards.
        BrokenShardError: unless tolerant, for a broken one.
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


def _sized(index: ShardIndex, content: str, index_folder: str | None, store: ShardStore) -> ShardIndex:
    if index.image_sizes is not None and index.sized_by == content:
        return index
    index = with_image_sizes(index, content, store)
    with contextlib.suppress(OSError):  # a shard that is gone keeps the sidecar that it has
        save_index(index, index_folder, store.stamp(index.location))
    return index
