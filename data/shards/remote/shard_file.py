"""Open shards: local files by pread, remote ones by range requests or from their copy in the cache."""

import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data.shards.locations import Stamp, file_system, is_http
from data.shards.remote.patience import Patience, http_status
from data.shards.remote.shard_cache import UNKNOWN
from data.shards.remote.web import WrongAnswerError, web_range
from data.shards.tar_headers import BrokenShardError

_SCAN_BYTES = 1 << 20  # read-ahead while scanning the headers of a remote tar
_PRECONDITION_FAILED, _BEYOND_THE_END = 412, 416


class ShardFile(ABC):
    """An open shard."""

    @abstractmethod
    def read_into(self, buffer: memoryview, start: int) -> int:
        """Fill a buffer with the bytes from `start`; returns their number, which is smaller at the end of the shard."""

    @abstractmethod
    def close(self) -> None:
        """Close the file."""

    def read(self, start: int, length: int) -> memoryview:
        """Bytes in newly allocated memory; fewer at the end of the shard."""
        buffer = memoryview(bytearray(length))
        return buffer[: self.read_into(buffer, start)]


class LocalFile(ShardFile):
    """A local file. Uses pread rather than a memory map: a file that was truncated gives a short read, not a bus error."""

    def __init__(self, path: str | Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)

    def stamp(self) -> Stamp:
        """State of the open file."""
        status = os.fstat(self._descriptor)
        return Stamp(status.st_size, status.st_mtime_ns)

    def read_into(self, buffer: memoryview, start: int) -> int:
        count = 0
        while count < len(buffer):  # a call reads at most 2 GB, or less on some network file systems
            read = os.preadv(self._descriptor, (buffer[count:],), start + count)
            if read == 0:
                break
            count += read
        return count

    def close(self) -> None:
        os.close(self._descriptor)


@dataclass(frozen=True)
class RemoteRanges:
    """Reads byte ranges of a URL."""

    url: str
    patience: Patience
    stamp: Stamp = UNKNOWN
    """State of the shard whose bytes are wanted."""
    state: Callable[[], Stamp] | None = None
    """Looks up its current state."""
    tag: str | None = None
    """Its ETag, for a server that refuses to send the bytes of another state."""

    def read(self, start: int, end: int) -> bytes:
        """Bytes [start, end); fewer at the end of the shard.

        Raises:
            BrokenShardError: if the shard was replaced.
            OSError: if it cannot be read, or if the server does not serve ranges.
        """
        read = self.patience.retry(lambda: self._ask(start, end), self.url)
        if read is None:
            raise OSError(
                f"'{self.url}': the complete file came where a range was asked for, so its server does not serve ranges; set "
                "data.cache_folder, where complete shards are kept."
            )
        return read

    def _ask(self, start: int, end: int) -> bytes | None:
        """One try; None if the server does not serve ranges."""
        try:
            read = self.patience.answer(lambda: self._sent(start, end))
            expected = end - start if self.stamp.size < 0 else min(end, self.stamp.size) - start
            if read is not None and len(read) != expected and (self.stamp.size >= 0 or len(read) > expected):
                raise WrongAnswerError(f"{len(read):,} bytes came where {expected:,} were asked for")
        except Exception as error:  # file system packages define their own exceptions
            status = http_status(error)
            if isinstance(error, WrongAnswerError) or status in (_PRECONDITION_FAILED, _BEYOND_THE_END):
                now = self._now()
                if now != self.stamp or status == _PRECONDITION_FAILED:
                    raise replaced(self.url, self.stamp, now) from error
            raise
        return read

    def _sent(self, start: int, end: int) -> bytes | None:
        system, name = file_system(self.url)
        if is_http(self.url):
            return web_range(system, name, start, end, self.stamp.size, self.tag)
        read: bytes = system.cat_file(name, start=start, end=end)
        return read

    def _now(self) -> Stamp:
        return self.stamp if self.state is None else self.state()


class RemoteFile(ShardFile):
    """Bytes of a URL by range requests, or from the cache once it contains the complete shard."""

    def __init__(self, ranges: RemoteRanges, find: Callable[[], Path | None]) -> None:
        self._ranges, self._find = ranges, find
        self._local: LocalFile | None = None

    def read_into(self, buffer: memoryview, start: int) -> int:
        if self._local is None and (path := self._find()) is not None:
            # The copy may be gone again, for want of room; then the server is read.
            with contextlib.suppress(FileNotFoundError):
                self._local = LocalFile(path)
        if self._local is not None:
            count = self._local.read_into(buffer, start)
            if count == len(buffer) or self._find() is not None:
                return count
            self.close()  # the cached copy was truncated since it was opened: fall back to the server
            self._local = None
        read = self._ranges.read(start, start + len(buffer))
        buffer[: len(read)] = read
        return len(read)

    def close(self) -> None:
        if self._local is not None:
            self._local.close()


class Slices:
    """Slices of a remote file, read ahead."""

    def __init__(self, ranges: RemoteRanges) -> None:
        self._ranges, self._start, self._read = ranges, 0, b""

    def __getitem__(self, part: slice) -> bytes:
        if not self._start <= part.start <= part.stop <= self._start + len(self._read):
            end, size = max(part.stop, part.start + _SCAN_BYTES), self._ranges.stamp.size
            end = end if size < 0 else min(end, size)
            if part.start >= end:
                return b""
            self._start, self._read = part.start, self._ranges.read(part.start, end)
        return self._read[part.start - self._start : part.stop - self._start]


def replaced(location: str, indexed: Stamp | None, now: Stamp) -> BrokenShardError:
    """The error for a shard in another state than the indexed one."""
    assert indexed is not None
    sizes = (
        f"{indexed.size:,} bytes then, {now.size:,} now" if indexed.size != now.size else "other time or tag"
    )
    return BrokenShardError(
        f"{location} was replaced since it was indexed ({sizes}), so its samples lie elsewhere; start again, which "
        "indexes it anew."
    )
