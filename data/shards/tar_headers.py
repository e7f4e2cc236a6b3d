"""Reads the headers of a tar without its contents: location of each member, and whether the file is complete.

Python's tarfile is five times slower, accepts a file truncated between two members, and ignores data after the first
end-of-archive mark.
"""

import mmap
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from sdxs_lightning.core.errors import OneLineError

_BLOCK = 512
_REGULAR = frozenset(b"0\0" + b"7")  # '0', NUL (old format), '7' (contiguous)
_EXTENDED = frozenset(b"xgLK")  # pax for one member and for all, GNU long name and long link
_WITHOUT_CONTENT = {ord("1"): "hard link", ord("2"): "symbolic link", ord("S"): "sparse file"}
_ZEROS = bytes(_BLOCK)
_MAX_EXTENSION_BYTES = 1 << 20
# Two zero blocks end an archive, then tar pads to its record of 20 blocks. More zeros indicate a preallocated file of an
# incomplete download.
_MAX_TRAILING_ZEROS = 2 * _BLOCK + 20 * _BLOCK - _BLOCK
_SCAN_BYTES = 1 << 20


class BrokenShardError(OneLineError, ValueError):
    """A shard that is not a complete, plain WebDataset tar."""


class ByteSource(Protocol):
    """Bytes of a file by slice: a memory map of a local file, range reads of a remote one."""

    def __getitem__(self, part: slice, /) -> bytes:
        """Bytes of a slice; fewer at the end of the file."""
        ...


class TarMember(NamedTuple):
    """A file in a tar: name and location of its content."""

    name: str
    offset: int
    size: int
    without_content: str = ""
    """Kind of a member that is not a regular file: "hard link", "symbolic link", "sparse file"."""


def tar_members(path: Path, named: str = "") -> Iterator[TarMember]:
    """The files of an uncompressed tar, in order.

    Reads ustar, GNU (long names, base-256 sizes) and pax (path, size) headers.

    Args:
        path: a local file.
        named: name in messages; by default the path.

    Raises:
        BrokenShardError: if a header's checksum is wrong, if the file ends inside a member or without an end-of-archive
            mark, or if that mark is followed by data or by more zeros than tar writes.
    """
    size, named = path.stat().st_size, named or str(path)
    if size == 0:
        raise BrokenShardError(f"{named} is empty; write or copy the shard again.")
    with open(path, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        yield from members_of(named, data, size)


def members_of(path: str, data: ByteSource, total: int) -> Iterator[TarMember]:
    """Like `tar_members`, for the bytes of any file.

    Args:
        path: name in messages.
        data: bytes of the file.
        total: length in bytes.
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
            _check_end(path, data, at, total)
            return
        name, size, kind = _parse(path, header, at)
        start = at + _BLOCK
        if overrides and kind not in _EXTENDED:
            size, name = _overridden(path, at, size, name, overrides)
        # A link has no content, whatever size its header states, as in tarfile and GNU tar.
        size = 0 if kind in _WITHOUT_CONTENT and kind != ord("S") else size
        if start + size > total:
            raise BrokenShardError(
                f"{path} is truncated: {_shown(name)} should end at byte {start + size}, but the file has {total}; "
                "write or copy it again."
            )
        if kind in _EXTENDED:
            if size > _MAX_EXTENSION_BYTES:
                raise _no_header(path, at)
            overrides = overrides | _extension(path, at, kind, data[start : start + size])
        else:
            if kind in _REGULAR:
                yield TarMember(name, start, size, "sparse file" if "sparse" in overrides else "")
            elif kind in _WITHOUT_CONTENT:
                yield TarMember(name, start, size, _WITHOUT_CONTENT[kind])
            overrides = {}
        at = start + (size + _BLOCK - 1) // _BLOCK * _BLOCK


def _check_end(path: str, data: ByteSource, at: int, total: int) -> None:
    """Check that only tar's zero padding follows the end-of-archive mark at byte `at`."""
    for start in range(at, total, _SCAN_BYTES):
        part = data[start : min(start + _SCAN_BYTES, total)]
        if rest := part.lstrip(b"\0"):
            raise BrokenShardError(
                f"{path} has the mark that ends a tar at byte {at}, but data follows at byte {start + len(part) - len(rest)}: "
                "a header was overwritten by zeros, or two tars were joined; write or copy it again (to join tars: tar "
                "--concatenate)."
            )
    if total - at > _MAX_TRAILING_ZEROS:
        raise BrokenShardError(
            f"{path} holds nothing but {total - at:,} zeros from byte {at} on, more than the {_MAX_TRAILING_ZEROS:,} at most "
            "that end a tar: a download that was preallocated and not completed looks so; copy it again, or write it with "
            "tar's default blocking factor."
        )


def _overridden(path: str, at: int, size: int, name: str, overrides: dict[str, str]) -> tuple[int, str]:
    stated = overrides.get("size", str(size))
    # A negative size would lead back to this header.
    if not stated.isascii() or not stated.isdigit() or len(stated) > 20:
        raise _no_header(path, at)
    return int(stated), overrides.get("path", name)


def _extension(path: str, at: int, kind: int, payload: bytes) -> dict[str, str]:
    """Fields of an extended header, which apply to the next member."""
    if kind == ord("L"):
        return {"path": payload.rstrip(b"\0").decode("utf-8", "surrogateescape")}
    if kind == ord("K") or kind == ord("g"):
        return {}
    try:
        return _pax_records(payload)
    except ValueError:
        raise _no_header(path, at) from None


def _shown(name: str) -> str:
    return repr(name if len(name) <= 200 else name[:200] + "...")


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
            if header[:2] in (b"\x1f\x8b", b"BZ", b"\xfd7", b"\x28\xb5")
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
        # "5 a=\n" is the shortest record; a length of 0 would be read for ever.
        if length < 5 or at + length > len(payload) or payload[at + length - 1] != ord("\n"):
            raise ValueError
        field, _, value = payload[at : at + length - 1].partition(b" ")[2].partition(b"=")
        records[field.decode()] = value.decode("utf-8", "surrogateescape")
        at += length
    if "\0" in records.get("path", ""):
        raise ValueError
    found: dict[str, str] = {field: records[field] for field in ("path", "size") if field in records}
    if any(field.startswith("GNU.sparse") for field in records):
        found["sparse"] = ""
        if "GNU.sparse.name" in records:
            found["path"] = records["GNU.sparse.name"]
    return found
