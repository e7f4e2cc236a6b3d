"""Reading the headers of a tar without its contents: what is where, and whether the file is whole.

Python's tarfile gives the same facts at a fifth of the speed and accepts a file that was cut between two
members.
"""

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_BLOCK = 512
_REGULAR = frozenset(b"0\0" + b"7")  # '0', NUL of the old format, '7' contiguous
_ZEROS = bytes(_BLOCK)


class BrokenShardError(ValueError):
    """A shard that is not a whole, plain WebDataset tar."""


@dataclass(frozen=True, slots=True)
class TarMember:
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
        yield from _members(path, data, size)


def _members(path: Path, data: mmap.mmap, total: int) -> Iterator[TarMember]:
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
        size = int(overrides.get("size", size))
        name = overrides.get("path", name)
        if start + size > total:
            raise BrokenShardError(
                f"{path} is truncated: '{name}' should end at byte {start + size}, but the file has {total}; "
                "write or copy it again."
            )
        if kind == ord("x"):
            overrides = overrides | _pax_records(data[start : start + size])
        elif kind == ord("L"):
            overrides = overrides | {
                "path": data[start : start + size].rstrip(b"\0").decode("utf-8", "surrogateescape")
            }
        elif kind != ord("g"):
            if kind in _REGULAR:
                yield TarMember(name, start, size)
            overrides = {}
        at = start + (size + _BLOCK - 1) // _BLOCK * _BLOCK


def _parse(path: Path, header: bytes, at: int) -> tuple[str, int, int]:
    try:
        stated = int(header[148:156].strip(b" \0"), 8)
        # The checksum is taken with its own eight bytes as spaces.
        if stated != sum(header) - sum(header[148:156]) + 8 * 32:
            raise ValueError
        size = (
            int.from_bytes(header[125:136], "big")
            if header[124] & 0x80
            else int(header[124:136].strip(b" \0") or b"0", 8)
        )
    except ValueError:
        compressed = (
            " (it looks compressed; shards are plain .tar files)"
            if header[:2] in (b"\x1f\x8b", b"BZ", b"\xfd7")
            else ""
        )
        raise BrokenShardError(
            f"{path} has no valid tar header at byte {at}{compressed}; write or copy it again."
        ) from None
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].split(b"\0", 1)[0] + b"/" + name
    return name.decode("utf-8", "surrogateescape"), size, header[156]


def _pax_records(payload: bytes) -> dict[str, str]:
    records, at = dict[str, str](), 0
    while at < len(payload):
        length = int(payload[at : payload.index(b" ", at)])
        field, _, value = payload[at : at + length].partition(b" ")[2].partition(b"=")
        records[field.decode()] = value.rstrip(b"\n").decode("utf-8", "surrogateescape")
        at += length
    return {field: records[field] for field in ("path", "size") if field in records}
