"""Builds the index of a shard from tar headers: keys, and the byte range of each member."""

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.shards.decoders import CAPTION_MEMBERS, JSON_MEMBER, READABLE
from data.shards.locations import Stamp
from data.shards.tar_headers import BrokenShardError, TarMember, tar_members

# WebDataset's rule: the key ends at the first dot of the file name; the rest is the extension.
_KEY_AND_EXTENSION = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)
_MAX_EXTENSIONS = 256
"""Limit per shard, since a table of samples x extensions is kept in memory."""


@dataclass(frozen=True)
class SampleFault:
    """A fault of a sample that is visible in the headers, or of the complete shard (no key)."""

    key: str
    reason: str


@dataclass(frozen=True)
class ShardIndex:
    """Byte ranges of the samples of one shard.

    `offsets` and `sizes` are (samples, extensions), int64, in bytes; -1 if a sample has no such member. A faulty sample keeps
    an empty row, so that the others keep their positions.
    """

    location: str
    extensions: tuple[str, ...]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    keys: NDArray[np.uint8]
    """All keys as UTF-8, one after another: Python strings would take ten times the memory."""
    key_ends: NDArray[np.int64]
    fingerprint: str
    """Hash of keys, members and sizes, independent of time and folder."""
    faults: tuple[SampleFault, ...] = ()
    checksums: NDArray[np.uint32] | None = None
    """CRC-32 of each member, shaped as `offsets`; None until `python -m data.prepare verify` has read the contents."""
    image_sizes: NDArray[np.int64] | None = None
    """(samples, 2): height and width of images or latents, for buckets; None until needed."""
    sized_by: str = ""
    """"images" or "latents": what `image_sizes` measures."""
    stamp: Stamp | None = None
    """State of the indexed file; None if unknown."""

    def __len__(self) -> int:
        """Samples in this shard."""
        return len(self.offsets)

    @property
    def path(self) -> Path:
        """Path of a local shard."""
        return Path(self.location)

    def key(self, sample: int) -> str:
        start = int(self.key_ends[sample - 1]) if sample else 0
        return self.keys[start : int(self.key_ends[sample])].tobytes().decode("utf-8", "surrogateescape")

    def members(self, sample: int) -> list[str]:
        return [self.extensions[column] for column in np.flatnonzero(self.offsets[sample] >= 0).tolist()]

    def column(self, extension: str) -> int | None:
        """The column of an extension in `offsets` and `sizes`, None if no sample has it."""
        return self.extensions.index(extension) if extension in self.extensions else None

    def require_complete(self) -> "ShardIndex":
        """Return this index.

        Raises:
            BrokenShardError: for the first fault, if any.
        """
        if self.faults:
            raise BrokenShardError(self.faults[0].reason)
        return self


def scan_shard(path: Path) -> ShardIndex:
    """Index one local tar by its headers.

    Raises:
        BrokenShardError: if the tar is incomplete, or for a faulty sample, as defined in `scan_members`.
    """
    return scan_members(str(path), tar_members(path)).require_complete()


def scan_members(location: str, members: Iterable[TarMember]) -> ShardIndex:
    """Index the members of a tar; errors are listed in its `faults`.

    A sample is faulty if its members are not adjacent, if one is a duplicate or a link, if its key leads out of the folder, or
    if it consists of several samples with dotted keys.

    Args:
        location: location of the shard.
        members: its files; may end in BrokenShardError, and the members before it are indexed.
    """
    samples: dict[str, dict[str, TarMember]] = {}
    faults: dict[str, str] = {}
    extensions = set[str]()
    current = ""
    try:
        for member in members:
            match = _KEY_AND_EXTENSION.fullmatch(member.name)
            if match is None:
                continue  # as in webdataset, names without a dot or with a leading dot are not samples
            key, extension = match[1], match[2].lower()
            found = samples.setdefault(key, {})
            if found and key != current:
                faults.setdefault(key, _apart(location, key))
            elif extension in found:
                faults.setdefault(key, _twice(location, key, extension))
            elif member.without_content:
                faults.setdefault(key, _linked(location, key, extension, member.without_content))
            elif not found and _leads_out(key):
                faults[key] = _outside(location, key)
            current = key
            found[extension] = member
            extensions.add(extension)
            if len(extensions) > _MAX_EXTENSIONS:
                raise BrokenShardError(
                    f"{location} has members of more than {_MAX_EXTENSIONS} kinds, the last '{extension[:80]}': a key ends at "
                    "the first dot of a file's name; write the shard again with keys without dots."
                )
    except BrokenShardError as error:
        # Even if the last sample looks complete, since further members may be missing.
        faults[current] = str(error)
    for key, found in samples.items():
        if len(found) > 1 and (melted := _melted(found)):
            faults.setdefault(key, _dotted(location, key, melted))
    for key in faults:
        if key in samples:
            samples[key] = {}
    reasons = tuple(SampleFault(key, reason) for key, reason in faults.items())
    return _build(location, samples, reasons)


def _melted(found: Mapping[str, TarMember]) -> str:
    """The part after the first dot in the key of a sample that was merged with others by the dot rule (`1` below), or "".

    `a.1.jpg, a.1.txt, a.2.jpg, a.2.txt` are meant as two samples but read as one sample, `a`, without an image. A single
    `a.mask.png` is an unused member.
    """
    kinds: dict[str, set[bool]] = {}
    for extension in found:
        dots = [place for place, letter in enumerate(extension) if letter == "."]
        if dots and extension not in READABLE:
            place = next((place for place in dots if extension[place + 1 :] in READABLE), None)
            if place is not None:
                is_text = extension[place + 1 :] in (*CAPTION_MEMBERS, JSON_MEMBER)
                kinds.setdefault(extension[:place], set()).add(is_text)
    return next((prefix for prefix, found_kinds in kinds.items() if len(found_kinds) == 2), "")


def _leads_out(key: str) -> bool:
    # We never write files named after keys, but programs that unpack the shard do.
    return key.startswith("/") or ".." in key.split("/") or not key.isprintable()


def _apart(location: str, key: str) -> str:
    return f"{location}: the members of {key!r} are not adjacent; write the shard again, sorted by key."


def _twice(location: str, key: str, extension: str) -> str:
    return f"{location}: {key!r} has the member {extension!r} twice; write the shard again with unique keys."


def _linked(location: str, key: str, extension: str, what: str) -> str:
    return (
        f"{location}: the member {extension!r} of {key!r} is a {what}, which has no content of its own; write the shard again "
        "with plain files (tar --hard-dereference --dereference, without --sparse)."
    )


def _dotted(location: str, key: str, prefix: str) -> str:
    return (
        f"{location}: {key!r} holds members named '{prefix}.*', which look like samples of their own: a key ends at the "
        "first dot of a file's name, so all of them are one sample; write the shard again with keys without dots."
    )


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
    digest = hashlib.blake2b("\0".join(extensions).encode("utf-8", "surrogateescape"), digest_size=16)
    for array in (offsets, sizes, keys, key_ends):
        digest.update(np.ascontiguousarray(array).tobytes())
    return ShardIndex(location, extensions, offsets, sizes, keys, key_ends, digest.hexdigest(), faults=faults)
