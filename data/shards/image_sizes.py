"""The size of every picture, or of every latent, for buckets: asked for once and kept in the sidecar."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from data.shards.decoders import IMAGE_MEMBERS, LATENT_MEMBER, BadSampleError, latent_size
from data.shards.images import UndecodableImageError, image_size
from data.shards.img2dataset import parquet_image_sizes
from data.shards.layout import Part, sample_rows
from data.shards.scan import ShardIndex
from data.shards.store import ShardFile, ShardStore
from data.shards.tar_headers import BrokenShardError

_HEAD_BYTES = 1 << 12  # holds the header of most pictures; those with a thumbnail in front are read whole


def with_image_sizes(index: ShardIndex, content: str, store: ShardStore) -> ShardIndex:
    """The index with heights and widths, from img2dataset's table, else from the headers of the members.

    Args:
        index: of a shard.
        content: "images" or "latents".
        store: how remote shards are reached.

    Returns:
        With `image_sizes`; (0, 0) where a sample has no such member, or one that cannot be read.
    """
    sizes = np.zeros((len(index), 2), dtype=np.int64)
    known = parquet_image_sizes(index.location) if content == "images" else {}
    members = IMAGE_MEMBERS if content == "images" else (LATENT_MEMBER,)
    file: ShardFile | None = None
    try:
        for row, (start, length, *_) in enumerate(sample_rows(index, [Part(content, members)]).tolist()):
            if known and (found := known.get(index.key(row).rpartition("/")[2])) is not None:
                sizes[row] = found
            elif start >= 0:
                file = file or store.open(index.location)
                sizes[row] = _size(file, start, length, content)
    except (OSError, BrokenShardError):
        pass  # whoever reads the samples meets the same fault, and tells
    finally:
        if file is not None:
            file.close()
    return replace(index, image_sizes=sizes, sized_by=content)


def _size(file: ShardFile, start: int, length: int, content: str) -> tuple[int, int]:
    for count in (min(_HEAD_BYTES, length), length):
        head = file.read(start, count)
        try:
            return image_size(head) if content == "images" else latent_size(head, "")
        except (UndecodableImageError, BadSampleError):
            continue
    return 0, 0


def sizes_of(indexes: tuple[ShardIndex, ...]) -> NDArray[np.int64]:
    """(samples, 2) of all shards; samples without a size get the commonest one, and are found bad when they are read."""
    sizes = np.concatenate([index.image_sizes for index in indexes if index.image_sizes is not None])
    unknown = (sizes < 1).any(axis=1)
    if unknown.all():
        raise ValueError(
            "No picture or latent of these shards has a size that can be read, so there are no buckets."
        )
    if unknown.any():
        values, counts = np.unique(sizes[~unknown], axis=0, return_counts=True)
        sizes[unknown] = values[counts.argmax()]
    return sizes
