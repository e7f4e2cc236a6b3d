"""Reading bytes of shards wherever they lie: local files by pread, remote ones by range or through the cache."""

import hashlib
import os
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from data.shards.locations import file_system, is_pipe, is_remote
from data.shards.shard_cache import ShardCache
from data.shards.sidecar import Stamp
from data.shards.tar_headers import BrokenShardError, TarMember, members_of, tar_members

_ATTEMPTS, _FIRST_PAUSE_SECONDS = 4, 0.2
_SCAN_BYTES = 1 << 20  # read ahead while a remote tar's headers are looked for
_T = TypeVar("_T")


class ShardFile(ABC):
    """An open shard."""

    @abstractmethod
    def read_into(self, buffer: memoryview, start: int) -> int:
        """Fill a buffer with the bytes from `start` on; how many there were, fewer where the shard ends."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the file."""

    def read(self, start: int, length: int) -> memoryview:
        """Bytes in memory of their own; fewer where the shard ends."""
        buffer = memoryview(bytearray(length))
        return buffer[: self.read_into(buffer, start)]


class LocalFile(ShardFile):
    """A file of this machine. pread rather than a mapping: one that has shrunk gives a short read, not a bus error."""

    def __init__(self, path: str | Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)

    def read_into(self, buffer: memoryview, start: int) -> int:
        """See `ShardFile`."""
        return os.preadv(self._descriptor, (buffer,), start)

    def close(self) -> None:
        """See `ShardFile`."""
        os.close(self._descriptor)


class RemoteFile(ShardFile):
    """A URL's bytes by ranged reads; from the cache once the whole shard has arrived there."""

    def __init__(self, url: str, find: Callable[[str], Path | None]) -> None:
        self._url, self._find = url, find
        self._local: LocalFile | None = None

    def read_into(self, buffer: memoryview, start: int) -> int:
        """See `ShardFile`."""
        if self._local is None and (path := self._find(self._url)) is not None:
            self._local = LocalFile(path)
        if self._local is not None:
            return self._local.read_into(buffer, start)
        system, name = file_system(self._url)
        read = persistent(lambda: system.cat_file(name, start=start, end=start + len(buffer)), self._url)
        buffer[: len(read)] = read
        return len(read)

    def close(self) -> None:
        """See `ShardFile`."""
        if self._local is not None:
            self._local.close()


class Arena:
    """Memory for the members of one batch, used again for the next one.

    Fresh memory for every sample would be mapped page by page as it is filled, which takes longer than the
    copy; memory that was just used is also still in the processor's cache.
    """

    def __init__(self) -> None:
        self._buffer, self._used, self._wanted = memoryview(b""), 0, 0

    def __reduce__(self) -> tuple[type["Arena"], tuple[()]]:
        """Another process has memory of its own."""
        return Arena, ()

    def clear(self) -> None:
        """Give all of it back; what was taken before must not be used any more."""
        if self._wanted > len(self._buffer):
            self._buffer = np.empty(self._wanted * 5 // 4, dtype=np.uint8).data
        self._used = self._wanted = 0

    def take(self, length: int) -> memoryview:
        """Memory that may be written to, since torch takes no other."""
        self._wanted += length
        if self._wanted > len(self._buffer):
            return memoryview(bytearray(length))  # this once; the next batch finds room
        start = self._used
        self._used = start + length
        return self._buffer[start : self._used]


class ShardStore:
    """Opens shards. Remote ones go through the cache if there is one: a shard is read by ranges at first, while a thread
    fetches it whole.
    """

    def __init__(self, cache: ShardCache | None = None) -> None:
        self.cache = cache
        self._wanted: queue.SimpleQueue[str] | None = None
        self._process = -1

    def __getstate__(self) -> dict[str, Any]:
        """Without the thread, which another process cannot use."""
        return {"cache": self.cache, "_wanted": None, "_process": -1}

    def stamp(self, location: str) -> Stamp:
        """What tells this state of a shard from another.

        Raises:
            OSError: if it cannot be reached.
        """
        if is_pipe(location):
            return Stamp(-1, 0)  # the command is all that is known of it
        if not is_remote(location):
            status = os.stat(location)
            return Stamp(status.st_size, status.st_mtime_ns)
        system, path = file_system(location)
        info = persistent(lambda: system.info(path), location)
        tags = ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "created")
        tag = " ".join(str(info[name]) for name in tags if info.get(name) is not None)
        mark = int.from_bytes(hashlib.blake2b(tag.encode(), digest_size=7).digest(), "big")
        return Stamp(int(info.get("size") or -1), mark)

    def members(self, location: str) -> Iterator[TarMember]:
        """The headers of a shard. Of a remote one without a cache, all bytes or ranges of it are read."""
        if not is_remote(location):
            return tar_members(Path(location))
        if self.cache is not None or is_pipe(location):
            return tar_members(self._fetched(location))
        return self._remote_members(location)

    def open(self, location: str) -> ShardFile:
        """Open a shard for reading by offset.

        Raises:
            OSError: if it cannot be reached.
            BrokenShardError: if a command fails.
        """
        if not is_remote(location):
            return LocalFile(location)
        if is_pipe(location):
            return LocalFile(self._fetched(location))
        if self.cache is None:
            return RemoteFile(location, lambda url: None)
        if self.cache.find(location) is None:
            self._want(location)
        return RemoteFile(location, self.cache.find)

    def _fetched(self, location: str) -> Path:
        cache = self.cache
        if cache is None:
            raise ValueError(
                f"The output of '{location}' cannot be read from the middle; set data.cache_folder, where it is kept."
            )
        path = persistent(lambda: cache.fetch(location), location)
        assert path is not None
        return path

    def _remote_members(self, url: str) -> Iterator[TarMember]:
        system, path = file_system(url)
        stamp = self.stamp(url)
        with system.open(path, "rb", block_size=_SCAN_BYTES, cache_type="readahead") as stream:
            yield from members_of(url, _Ranges(stream), stamp.size)

    def _want(self, url: str) -> None:
        if self._wanted is None or self._process != os.getpid():  # a fork inherits no thread
            self._wanted, self._process = queue.SimpleQueue(), os.getpid()
            threading.Thread(target=self._fetch_wanted, args=(self._wanted,), daemon=True).start()
        self._wanted.put(url)

    def _fetch_wanted(self, wanted: "queue.SimpleQueue[str]") -> None:
        assert self.cache is not None
        while True:
            url = wanted.get()
            try:
                self.cache.fetch(url, wait=False)
            except (OSError, BrokenShardError):
                continue  # whoever reads the shard by ranges meets the same fault, and tells


class _Ranges:
    """Slices of a seekable stream."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getitem__(self, part: slice) -> bytes:
        self._stream.seek(part.start)
        data: bytes = self._stream.read(part.stop - part.start)
        return data


def persistent(call: Callable[[], _T], location: str) -> _T:
    """Call again after a pause where the network failed; a missing file is missing.

    Raises:
        FileNotFoundError: if there is no such file.
        OSError: if it failed four times, whatever the file system's own package raised.
    """
    pause = _FIRST_PAUSE_SECONDS
    for attempt in range(_ATTEMPTS):
        try:
            return call()
        except (FileNotFoundError, BrokenShardError, PermissionError):
            raise
        except Exception as error:  # packages of file systems have exceptions of their own
            if attempt == _ATTEMPTS - 1:
                raise OSError(f"'{location}' cannot be read ({type(error).__name__}: {error}).") from error
            time.sleep(pause)
            pause *= 4
    raise AssertionError
