"""Opens shards: local files, and remote ones by range requests or through the cache."""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from data.shards.locations import Stamp, file_system, is_http, is_pipe, is_remote
from data.shards.remote.fetching import Fetcher
from data.shards.remote.patience import Patience
from data.shards.remote.shard_cache import UNKNOWN, ShardCache
from data.shards.remote.shard_file import LocalFile, RemoteFile, RemoteRanges, ShardFile, Slices, replaced
from data.shards.tar_headers import TarMember, members_of, tar_members

_FETCHES = 10  # of a shard whose copy is removed before it is opened


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
        self._fetcher = Fetcher(self._fetch)
        self._tags: dict[str, tuple[Stamp, str]] = {}

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
        tag = tag or str(info.get("Last-Modified") or "")
        mark = int.from_bytes(hashlib.blake2b(tag.encode(), digest_size=7).digest(), "big")
        stamp = Stamp(int(info.get("size") or -1), mark)
        # A weak tag never satisfies If-Match.
        if is_http(location) and str(info.get("ETag") or "").startswith('"'):
            self._tags[location] = stamp, str(info["ETag"])
        return stamp

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
                raise replaced(location, stamp, now)
            return file
        if is_pipe(location):
            return LocalFile(self._fetched(location, UNKNOWN))
        cache = self.cache
        if cache is not None and stamp is not None and cache.find(location, stamp) is not None:
            return RemoteFile(self._ranges(location, stamp), lambda: cache.find(location, stamp))
        now = self.stamp(location)
        if stamp not in (None, now):
            raise replaced(location, stamp, now)
        if cache is None:
            return RemoteFile(self._ranges(location, now), lambda: None)
        self._fetcher.want(location, now)
        return RemoteFile(self._ranges(location, now), lambda: cache.find(location, now))

    def fetch_ahead(self, location: str, stamp: Stamp | None) -> None:
        """Fetch a shard into the cache before it is read.

        Args:
            location: path, URL or command.
            stamp: the indexed state; a shard whose state is unknown is left until it is read.
        """
        if self.cache is not None and stamp is not None and is_remote(location):
            self._fetcher.want(location, stamp, ahead=True)

    def _fetched(self, location: str, stamp: Stamp) -> Path:
        cache = self.cache
        if cache is None:
            raise ValueError(
                f"The output of '{location}' cannot be read from the middle; set data.cache_folder, where it is kept."
            )
        path = self.patience.retry(
            lambda: cache.fetch(
                location, stamp, state=self._state_of(location), tag=self._tag_of(location, stamp)
            ),
            location,
        )
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
        if stamp.size < 0:
            raise OSError(
                f"'{url}': its server does not state the shard's size; set data.cache_folder, where complete shards are kept."
            )
        yield from members_of(url, Slices(self._ranges(url, stamp)), stamp.size)

    def _ranges(self, url: str, stamp: Stamp) -> RemoteRanges:
        return RemoteRanges(url, self.patience, stamp, self._state_of(url), self._tag_of(url, stamp))

    def _tag_of(self, url: str, stamp: Stamp) -> str | None:
        of, tag = self._tags.get(url, (None, None))
        return tag if of == stamp else None

    def _fetch(self, url: str, stamp: Stamp) -> None:
        assert self.cache is not None
        self.cache.fetch(url, stamp, wait=False, state=self._state_of(url), tag=self._tag_of(url, stamp))

    def _state_of(self, url: str) -> Callable[[], Stamp]:
        return lambda: self.stamp(url)
