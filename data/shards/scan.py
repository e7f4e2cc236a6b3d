"""From the headers of a tar to the index of its samples: keys, and where each member lies."""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.shards.tar_headers import BrokenShardError, TarMember, tar_members

# WebDataset's rule: the key ends at the first dot of the file's name; what follows says what the member is.
_KEY_AND_EXTENSION = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")


@dataclass(frozen=True)
class SampleFault:
    """What is wrong with a sample, or with a whole shard (no key), by the headers alone."""

    key: str
    reason: str


@dataclass(frozen=True)
class ShardIndex:
    """Where the samples of one shard lie.

    `offsets` and `sizes` are (samples, extensions), int64, in bytes; -1 where a sample has no such member. A
    sample with a fault keeps its row, with no member at all, so that the others keep their positions.
    """

    location: str
    extensions: tuple[str, ...]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    keys: NDArray[np.uint8]
    """All keys as UTF-8, one after another: strings of Python would take ten times the memory."""
    key_ends: NDArray[np.int64]
    fingerprint: str
    """Of keys, members and sizes, not of time or folder: a copied shard keeps it."""
    faults: tuple[SampleFault, ...] = ()
    checksums: NDArray[np.uint32] | None = None
    """CRC-32 of each member, as `offsets`; None until `with_checksums` has read the contents."""
    image_sizes: NDArray[np.int64] | None = None
    """(samples, 2): height and width of pictures or latents, for buckets; None until they were asked for."""
    sized_by: str = ""
    """"images" or "latents": whose sizes these are."""

    def __len__(self) -> int:
        """Samples in this shard."""
        return len(self.offsets)

    @property
    def path(self) -> Path:
        """Of a local shard."""
        return Path(self.location)

    def key(self, sample: int) -> str:
        """The key of a sample."""
        start = int(self.key_ends[sample - 1]) if sample else 0
        return self.keys[start : int(self.key_ends[sample])].tobytes().decode("utf-8", "surrogateescape")

    def column(self, extension: str) -> int | None:
        """Where this extension stands in `offsets` and `sizes`, None if no sample has it."""
        return self.extensions.index(extension) if extension in self.extensions else None

    def require_whole(self) -> "ShardIndex":
        """This index.

        Raises:
            BrokenShardError: with the first fault.
        """
        if self.faults:
            raise BrokenShardError(self.faults[0].reason)
        return self


def scan_shard(path: Path) -> ShardIndex:
    """Index one local tar by its headers.

    Raises:
        BrokenShardError: if the tar is not whole, if members of a sample do not stand together, if one occurs
            twice, or if a name leads out of the folder.
    """
    return scan_members(str(path), tar_members(path)).require_whole()


def scan_members(location: str, members: Iterable[TarMember]) -> ShardIndex:
    """The index of a tar's members; what is wrong stands in its `faults`.

    Args:
        location: of the shard.
        members: its regular files; may end in BrokenShardError, and what came before it is indexed.
    """
    samples: dict[str, dict[str, TarMember]] = {}
    faults: dict[str, str] = {}
    current = ""
    try:
        for member in members:
            match = _KEY_AND_EXTENSION.fullmatch(member.name)
            if match is None:
                continue  # a name without a dot or beginning with one is no sample for webdataset either
            key, extension = match[1], match[2].lower()
            found = samples.setdefault(key, {})
            if found and key != current:
                faults.setdefault(key, _apart(location, key))
            elif extension in found:
                faults.setdefault(key, _twice(location, key, extension))
            elif not found and _leads_out(key):
                faults[key] = _outside(location, key)
            current = key
            found[extension] = member
    except BrokenShardError as error:
        # Even if it looks complete: members of the last sample may lie behind the cut.
        faults[current] = str(error)
    for key in faults:
        if key in samples:
            samples[key] = {}
    reasons = tuple(SampleFault(key, reason) for key, reason in faults.items())
    return _build(location, samples, reasons)


def _leads_out(key: str) -> bool:
    # Nothing here is ever written under a key, but the next program that unpacks the shard may.
    return key.startswith("/") or ".." in key.split("/") or not key.isprintable()


def _apart(location: str, key: str) -> str:
    return f"{location}: the members of '{key}' do not stand together; write the shard again, sorted by key."


def _twice(location: str, key: str, extension: str) -> str:
    return f"{location}: '{key}' has the member '{extension}' twice; write the shard again with unique keys."


def _outside(location: str, key: str) -> str:
    return (
        f"{location}: the key {key!r} leads out of its folder or holds control characters; write the shard "
        "again with plain names."
    )


def _build(
    location: str, samples: dict[str, dict[str, TarMember]], faults: tuple[SampleFault, ...]
) -> ShardIndex:
    extensions = tuple(sorted({extension for members in samples.values() for extension in members}))
    columns = {extension: column for column, extension in enumerate(extensions)}
    width = len(extensions)
    places = [row * width + columns[name] for row, found in enumerate(samples.values()) for name in found]
    members = [member for found in samples.values() for member in found.values()]
    offsets = np.full((len(samples), width), -1, dtype=np.int64)
    sizes = np.full_like(offsets, -1)
    offsets.flat[places] = [member.offset for member in members]
    sizes.flat[places] = [member.size for member in members]
    encoded = [key.encode("utf-8", "surrogateescape") for key in samples]
    keys = np.frombuffer(b"".join(encoded), dtype=np.uint8)
    key_ends = np.fromiter(accumulate(map(len, encoded)), dtype=np.int64, count=len(encoded))
    digest = hashlib.blake2b("\0".join(extensions).encode(), digest_size=16)
    for array in (offsets, sizes, keys, key_ends):
        digest.update(np.ascontiguousarray(array).tobytes())
    return ShardIndex(location, extensions, offsets, sizes, keys, key_ends, digest.hexdigest(), faults=faults)
