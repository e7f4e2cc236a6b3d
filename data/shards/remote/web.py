"""Answers of web servers, which are checked to be what was asked for.

Servers, caches and proxies send complete files for ranges, other ranges, pages of their own with status 200, and files of
another state. fsspec returns such a body like any other.
"""

from __future__ import annotations

import re
from typing import Any

from fsspec.asyn import sync

_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)", re.IGNORECASE)


class WrongAnswerError(OSError):
    """An answer with other bytes than those that were asked for."""


def web_range(system: Any, url: str, start: int, end: int, size: int, tag: str | None) -> bytes | None:
    """Bytes [start, end) of a file by one request; fewer at its end. None if the server sends complete files only.

    Args:
        system: fsspec's HTTP file system.
        url: of the file.
        start: first byte.
        end: the byte after the last one.
        size: of the file; -1 if unknown.
        tag: its ETag, for a server that refuses to send the bytes of another state; None if unknown.

    Raises:
        FileNotFoundError: if there is no such file.
        WrongAnswerError: for bytes of another place or state.
        Exception: of aiohttp, for other failures.
    """
    answer: bytes | None = sync(system.loop, _web_range, system, url, start, end, size, tag)
    return answer


async def _web_range(system: Any, url: str, start: int, end: int, size: int, tag: str | None) -> bytes | None:
    options = dict(system.kwargs)
    # A range of compressed bytes could not be decompressed.
    headers = (options.pop("headers", None) or {}) | {"Accept-Encoding": "identity"}
    headers["Range"] = f"bytes={start}-{end - 1}"
    if tag is not None:
        headers["If-Match"] = tag
    session = await system.set_session()
    async with session.get(system.encode_url(url), headers=headers, **options) as response:
        if response.status == 404:
            raise FileNotFoundError(url)
        response.raise_for_status()
        if tag is not None and response.headers.get("ETag", tag) != tag:
            raise WrongAnswerError("the bytes of another state of the file came")
        if response.status == 206:
            expected = _stated_length(response.headers.get("Content-Range", ""), start, end, size)
        elif size < 0 or response.content_length in (None, size):
            if start or response.content_length is None or response.content_length > end:
                return None
            expected = response.content_length
        else:  # such as a page that says that the server is being maintained
            raise WrongAnswerError(
                f"{response.content_length:,} bytes of type {response.content_type} came instead of a range"
            )
        read: bytes = await response.read()
    if len(read) != expected:
        raise WrongAnswerError(f"{len(read):,} bytes came where {expected:,} were asked for")
    return read


def _stated_length(content_range: str, start: int, end: int, size: int) -> int:
    stated = _CONTENT_RANGE.fullmatch(content_range.strip())
    if stated is not None:
        first, last, of = int(stated[1]), int(stated[2]), stated[3]
        if start == first <= last < end and (size < 0 or of in ("*", str(size))):
            return last + 1 - first
    raise WrongAnswerError(
        f"bytes {start}-{end - 1} were asked for, and the server states '{content_range[:80]}'"
    )
