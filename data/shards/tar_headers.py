"""Reading the headers of a tar without its contents: what is where, and whether the file is whole.

Python's tarfile gives the same facts at a fifth of the speed and accepts a file that was cut between two
members.
"""

import mmap
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

_BLOCK = 512
_REGULAR = frozenset(b"0\0" + b"7")  # '0', NUL of the old format, '7' contiguous
_EXTENDED = frozenset(b"xgLK")  # pax for one member and for all, GNU's long name and long link
_ZEROS = bytes(_BLOCK)


class BrokenShardError(ValueError):
    """A shard that is not a whole, plain WebDataset tar."""


class Bytes(Protocol):
    """A file's bytes, cut out by slices: a mapping of a local one, ranged reads of a remote one."""

    def __getitem__(self, part: slice, /) -> bytes:
        """The bytes of a slice; fewer where the file ends."""
        ...


class TarMember(NamedTuple):
    """A regular file in a tar: its name, and where its content lies."""

    name: str
    offset: int
    size: int


def tar_members(path: Path) -> Iterator[TarMember]:
    """The regular files of an uncompressed tar, in order.

    Reads ustar, GNU (long names, base-256 sizes) and pax (path, size) headers.

    Args:
        path: a local file.

    Raises:
        BrokenShardError: naming the file, if a header's checksum is wrong, if the file ends inside a member,
            or if it has no end-of-archive mark (a file cut between members has none).
    """
    size = path.stat().st_size
    if size == 0:
        raise BrokenShardError(f"{path} is empty; write or copy the shard again.")
    with open(path, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        yield from members_of(str(path), data, size)


def members_of(path: str, data: Bytes, total: int) -> Iterator[TarMember]:
    """As `tar_members`, of bytes that lie anywhere.

    Args:
        path: for messages.
        data: the file.
        total: its length in bytes.
    """
    at, overrides = 0, dict[str, str]()
    while True:
        header = data[at : at + _BLOCK]
        if len(header) < _BLOCK:
            raise BrokenShardError(
                f"{path} is truncated: it ends at byte {total} without the mark that ends a tar; write or "
                "copy it again."
            )
        if header == _ZEROS:
            return
        name, size, kind = _parse(path, header, at)
        start = at + _BLOCK
        if overrides and kind not in _EXTENDED:
            size, name = _overridden(path, at, size, name, overrides)
        if start + size > total:
            raise BrokenShardError(
                f"{path} is truncated: '{name}' should end at byte {start + size}, but the file has {total}; "
                "write or copy it again."
            )
        if kind in _EXTENDED:
            overrides = overrides | _extension(path, at, kind, data[start : start + size])
        else:
            if kind in _REGULAR:
                yield TarMember(name, start, size)
            overrides = {}
        at = start + (size + _BLOCK - 1) // _BLOCK * _BLOCK


def _overridden(path: str, at: int, size: int, name: str, overrides: dict[str, str]) -> tuple[int, str]:
    stated = overrides.get("size", str(size))
    if not stated.isascii() or not stated.isdigit():  # a negative size would lead back to this header
        raise _no_header(path, at)
    return int(stated), overrides.get("path", name)


def _extension(path: str, at: int, kind: int, payload: bytes) -> dict[str, str]:
    """What an extended header says of the member after it."""
    if kind == ord("L"):
        return {"path": payload.rstrip(b"\0").decode("utf-8", "surrogateescape")}
    if kind == ord("K") or kind == ord("g"):
        return {}
    try:
        return _pax_records(payload)
    except ValueError:
        raise _no_header(path, at) from None


def _no_header(path: str, at: int, hint: str = "") -> BrokenShardError:
    return BrokenShardError(f"{path} has no valid tar header at byte {at}{hint}; write or copy it again.")


def _parse(path: str, header: bytes, at: int) -> tuple[str, int, int]:
    try:
        stated = int(header[148:156].strip(b" \0"), 8)
        # The checksum is the sum of all bytes, with its own eight as spaces. Adler-32 has the sum in its lower half, modulo
        # 65521 and plus 1, at a twentieth of the time of sum().
        if zlib.adler32(header) & 0xFFFF != (stated + sum(header[148:156]) - 8 * 32 + 1) % 65521:
            raise ValueError
        size = (
            int.from_bytes(header[125:136], "big")
            if header[124] & 0x80
            else int(header[124:136].strip(b" \0") or b"0", 8)
        )
        if size < 0:
            raise ValueError
    except ValueError:
        compressed = (
            " (it looks compressed; shards are plain .tar files)"
            if header[:2] in (b"\x1f\x8b", b"BZ", b"\xfd7")
            else ""
        )
        raise _no_header(path, at, compressed) from None
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].split(b"\0", 1)[0] + b"/" + name
    return name.decode("utf-8", "surrogateescape"), size, header[156]


def _pax_records(payload: bytes) -> dict[str, str]:
    records, at = dict[str, str](), 0
    while at < len(payload):
        length = int(payload[at : payload.index(b" ", at)])
        if length < 5:  # "5 a=\n" is the shortest; a length of 0 would be read for ever
            raise ValueError
        field, _, value = payload[at : at + length].partition(b" ")[2].partition(b"=")
        records[field.decode()] = value.rstrip(b"\n").decode("utf-8", "surrogateescape")
        at += length
    return {field: records[field] for field in ("path", "size") if field in records}
