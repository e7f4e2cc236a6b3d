"""Reads bytes of shards: local files by pread, remote ones by range requests or through the cache."""

import contextlib
import hashlib
import os
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data.shards.locations import Stamp, file_system, is_pipe, is_remote
from data.shards.patience import Patience
from data.shards.shard_cache import UNKNOWN, ShardCache
from data.shards.tar_headers import BrokenShardError, TarMember, members_of, tar_members

_FETCHES = 10  # of a shard whose copy is removed before it is opened
_SCAN_BYTES = 1 << 20  # read-ahead while scanning the headers of a remote tar


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


class RemoteFile(ShardFile):
    """Bytes of a URL by range requests, or from the cache once it contains the complete shard."""

    def __init__(self, url: str, find: Callable[[], Path | None], patience: Patience) -> None:
        self._url, self._find, self._patience = url, find, patience
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
        read = _ranged(self._url, start, start + len(buffer), self._patience)
        buffer[: len(read)] = read
        return len(read)

    def close(self) -> None:
        if self._local is not None:
            self._local.close()


class Arena:
    """Memory for the members of one batch, reused for the next one.

    New memory for every sample would be mapped page by page, which takes longer than the copy; reused memory is also likely
    in the CPU cache.
    """

    def __init__(self) -> None:
        self._buffer, self._used, self._wanted = memoryview(b""), 0, 0

    def __reduce__(self) -> tuple[type["Arena"], tuple[()]]:
        """Pickle as an empty arena."""
        return Arena, ()

    def clear(self) -> None:
        """Reuse all memory; buffers taken before become invalid."""
        if self._wanted > len(self._buffer):
            self._buffer = np.empty(self._wanted * 5 // 4, dtype=np.uint8).data
        self._used = self._wanted = 0

    def take(self, length: int) -> memoryview:
        """Take a writable buffer, as torch requires."""
        self._wanted += length
        if self._wanted > len(self._buffer):
            return memoryview(bytearray(length))  # temporary; `clear` enlarges the buffer
        start = self._used
        self._used = start + length
        return self._buffer[start : self._used]


class ShardStore:
    """Opens shards. With a cache, a remote shard is read by range requests until a thread has fetched it completely."""

    def __init__(self, cache: ShardCache | None = None, patience: Patience | None = None) -> None:
        self.cache, self.patience = cache, patience or Patience()
        self._wanted: queue.SimpleQueue[tuple[str, Stamp]] | None = None
        self._process = -1

    def __getstate__(self) -> dict[str, Any]:
        """State without the thread, which cannot be pickled."""
        return self.__dict__ | {"_wanted": None, "_process": -1}

    def stamp(self, location: str) -> Stamp:
        """Current state of a shard.

        Raises:
            OSError: if it cannot be accessed.
        """
        if is_pipe(location):
            return UNKNOWN  # the state of a command's output is unknown
        if not is_remote(location):
            status = os.stat(location)
            return Stamp(status.st_size, status.st_mtime_ns)
        system, path = file_system(location)
        info = self.patience.call(lambda: system.info(path), location)
        tags = ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "created")
        tag = " ".join(str(info[name]) for name in tags if info.get(name) is not None)
        mark = int.from_bytes(hashlib.blake2b(tag.encode(), digest_size=7).digest(), "big")
        return Stamp(int(info.get("size") or -1), mark)

    def members(self, location: str, stamp: Stamp | None = None) -> Iterator[TarMember]:
        """Headers of a shard in that state (default: the current one); remote shards are read by range without a cache."""
        if not is_remote(location):
            return tar_members(Path(location))
        stamp = self.stamp(location) if stamp is None else stamp
        if self.cache is not None or is_pipe(location):
            return self._cached_members(location, stamp)
        return self._remote_members(location, stamp)

    def open(self, location: str, stamp: Stamp | None = None) -> ShardFile:
        """Open a shard for reading by offset.

        Args:
            location: path, URL or command.
            stamp: the indexed state; None takes the current one.

        Raises:
            OSError: if it cannot be accessed.
            BrokenShardError: if its state has changed, or if a command fails.
        """
        if not is_remote(location):
            file = LocalFile(location)
            if stamp not in (None, now := file.stamp()):
                file.close()
                raise _replaced(location, stamp, now)
            return file
        if is_pipe(location):
            return LocalFile(self._fetched(location, UNKNOWN))
        cache = self.cache
        if cache is not None and stamp is not None and cache.find(location, stamp) is not None:
            return RemoteFile(location, lambda: cache.find(location, stamp), self.patience)
        now = self.stamp(location)
        if stamp not in (None, now):
            raise _replaced(location, stamp, now)
        if cache is None:
            return RemoteFile(location, lambda: None, self.patience)
        self._want(location, now)
        return RemoteFile(location, lambda: cache.find(location, now), self.patience)

    def _fetched(self, location: str, stamp: Stamp) -> Path:
        cache = self.cache
        if cache is None:
            raise ValueError(
                f"The output of '{location}' cannot be read from the middle; set data.cache_folder, where it is kept."
            )
        path = self.patience.retry(lambda: cache.fetch(location, stamp), location)
        assert path is not None
        return path

    def _cached_members(self, location: str, stamp: Stamp) -> Iterator[TarMember]:
        for _ in range(_FETCHES):
            path = self._fetched(location, stamp)
            # The copy may be gone again, for the room of what another thread fetched.
            with contextlib.suppress(FileNotFoundError):
                return iter(list(tar_members(path, f"{location} (its copy {path})")))
        raise OSError(
            f"'{location}' was removed from the cache {_FETCHES} times before it was read; raise data.cache_gb."
        )

    def _remote_members(self, url: str, stamp: Stamp) -> Iterator[TarMember]:
        yield from members_of(url, _Ranges(url, stamp.size, self.patience), stamp.size)

    def _want(self, url: str, stamp: Stamp) -> None:
        if self._wanted is None or self._process != os.getpid():  # threads are not inherited by a fork
            self._wanted, self._process = queue.SimpleQueue(), os.getpid()
            threading.Thread(target=self._fetch_wanted, args=(self._wanted,), daemon=True).start()
        self._wanted.put((url, stamp))

    def _fetch_wanted(self, wanted: "queue.SimpleQueue[tuple[str, Stamp]]") -> None:
        assert self.cache is not None
        while True:
            url, stamp = wanted.get()
            try:
                self.cache.fetch(url, stamp, wait=False)
            except (OSError, BrokenShardError):
                continue  # reported when the shard is read by range


class _Ranges:
    """Slices of a remote file, read ahead."""

    def __init__(self, url: str, size: int, patience: Patience) -> None:
        self._url, self._size, self._patience = url, size, patience
        self._start, self._read = 0, b""

    def __getitem__(self, part: slice) -> bytes:
        if not self._start <= part.start <= part.stop <= self._start + len(self._read):
            end = max(part.stop, part.start + _SCAN_BYTES)
            end = end if self._size < 0 else min(end, self._size)
            if part.start >= end:
                return b""
            self._start, self._read = part.start, _ranged(self._url, part.start, end, self._patience)
        return self._read[part.start - self._start : part.stop - self._start]


def _ranged(url: str, start: int, end: int, patience: Patience) -> bytes:
    """Bytes [start, end) of a URL; fewer at its end."""
    system, name = file_system(url)
    read: bytes = patience.call(lambda: system.cat_file(name, start=start, end=end), url)
    if len(read) > end - start:
        raise OSError(
            f"'{url}': {len(read):,} bytes came where {end - start:,} were asked for, so its server does not serve "
            "ranges; set data.cache_folder, where complete shards are kept."
        )
    return read


def _replaced(location: str, indexed: Stamp | None, now: Stamp) -> BrokenShardError:
    assert indexed is not None
    sizes = (
        f"{indexed.size:,} bytes then, {now.size:,} now" if indexed.size != now.size else "other time or tag"
    )
    return BrokenShardError(
        f"{location} was replaced since it was indexed ({sizes}), so its samples lie elsewhere; start again, which "
        "indexes it anew."
    )
