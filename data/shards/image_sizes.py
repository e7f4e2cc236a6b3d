"""Sizes of images or latents for buckets, determined once and stored in the sidecar."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.shards.decoders import IMAGE_MEMBERS, LATENT_MEMBER, BadSampleError, latent_shape
from data.shards.images import UndecodableImageError, image_size
from data.shards.indexing.table import ShardTable
from data.shards.layout import Part, sample_rows
from data.shards.locations import is_remote
from data.shards.remote.shard_file import ShardFile
from data.shards.scan import ShardIndex
from data.shards.store import ShardStore
from data.shards.tar_headers import BrokenShardError

_HEAD_BYTES = (
    1 << 12
)  # contains the header of most images; those that begin with a thumbnail are read completely
_MAX_SIDE = 1 << 20


def with_image_sizes(index: ShardIndex, content: str, store: ShardStore) -> ShardIndex:
    """Add heights and widths to an index, from img2dataset's table or else from the headers of the members.

    Args:
        index: index of a shard.
        content: "images" or "latents".
        store: access to remote shards.

    Returns:
        The index with `image_sizes`; (0, 0) for samples without a readable member.
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
        pass  # reported when the sample is read
    finally:
        if file is not None:
            file.close()
    return replace(index, image_sizes=sizes, sized_by=content)


def _size(file: ShardFile, start: int, length: int, content: str) -> tuple[int, int]:
    for count in (min(_HEAD_BYTES, length), length):
        head = file.read(start, count)
        try:
            return image_size(head) if content == "images" else latent_shape(head, "")[1:]
        except (UndecodableImageError, BadSampleError):
            continue
    return 0, 0


def sizes_of(table: ShardTable) -> NDArray[np.int64]:
    """(samples, 2) of all shards; samples without a size get the most common one and are reported when read."""
    assert table.image_sizes is not None
    sizes: NDArray[np.int64] = table.image_sizes.astype(np.int64)
    unknown = (sizes < 1).any(axis=1)
    if unknown.all():
        raise ValueError(
            "No image or latent of these shards has a size that can be read, so there are no buckets."
        )
    if unknown.any():
        values, counts = np.unique(sizes[~unknown], axis=0, return_counts=True)
        sizes[unknown] = values[counts.argmax()]
    return sizes


def parquet_image_sizes(location: str) -> Mapping[str, tuple[int, int]]:
    """Height and width by key, from img2dataset's parquet file next to a local shard; empty without one."""
    path = Path(location)
    path = path.with_name(path.name.removesuffix(".tar") + ".parquet")
    if is_remote(location) or not path.is_file():
        return {}
    import pyarrow.parquet  # takes a third of a second, rarely needed

    try:
        table = pyarrow.parquet.read_table(path, columns=["key", "height", "width"]).to_pydict()
        rows = zip(table["key"], table["height"], table["width"], strict=True)
        sizes = {str(key): (int(height), int(width)) for key, height, width in rows if height and width}
    except Exception:  # damaged or another tool's table: use the image headers
        return {}
    return {key: size for key, size in sizes.items() if min(size) > 0 and max(size) <= _MAX_SIDE}
