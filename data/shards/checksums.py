"""Checksums of contents, which a tar lacks: it protects its headers alone.

`python -m data.prepare verify` reads every member once and keeps CRC-32 in the sidecar; from then on a flipped
bit is found whenever the sample is read, not only where a decoder stumbles over it.
"""

import zlib
from dataclasses import replace

import numpy as np

from data.shards.scan import ShardIndex
from data.shards.store import ShardStore
from data.shards.tar_headers import BrokenShardError


def with_checksums(index: ShardIndex, store: ShardStore | None = None) -> ShardIndex:
    """The index with the checksum of every member.

    Args:
        index: of a shard as it is now.
        store: how remote shards are reached.

    Raises:
        BrokenShardError: if the shard ends early.
        OSError: if it cannot be read.
    """
    checksums = np.zeros(index.offsets.shape, dtype=np.uint32)
    file = (store or ShardStore()).open(index.location)
    try:
        for row, column in np.argwhere(index.offsets >= 0).tolist():
            offset, size = int(index.offsets[row, column]), int(index.sizes[row, column])
            content = file.read(offset, size)
            if len(content) != size:
                raise BrokenShardError(
                    f"{index.location} ends inside '{index.key(row)}'; write or copy it again."
                )
            checksums[row, column] = zlib.crc32(content)
    finally:
        file.close()
    return replace(index, checksums=checksums)


def changed_members(index: ShardIndex, store: ShardStore | None = None) -> list[tuple[str, str]]:
    """Key and extension of the members whose bytes differ from the checksums that the index holds; none without any."""
    if index.checksums is None:
        return []
    now = with_checksums(index, store).checksums
    rows = np.argwhere(now != index.checksums).tolist()
    return [(index.key(row), index.extensions[column]) for row, column in rows]
