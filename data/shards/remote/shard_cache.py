"""A bounded cache folder of remote shards, shared by the processes of a machine.

File names depend on the complete URL, since the first shard of every data set is named 00000.tar, and on the state of the
remote file (its stamp), so that replaced shards are fetched again. The least recently opened shard is removed first; processes
that have it open can still read it.
"""

import contextlib
import hashlib
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from data.shards.locations import Stamp, file_name, file_system, is_http, is_pipe
from data.shards.remote.patience import Patience
from data.shards.tar_headers import BrokenShardError

_log = logging.getLogger(__name__)
_COPY_BYTES = 1 << 22
UNKNOWN = Stamp(-1, 0)
"""Stamp of a command's output, and of a file whose server reports no state."""


class ShardCache:
    """Fetches complete shards and keeps as many as fit.

    Args:
        folder: cache folder, created if missing.
        gigabytes: maximum total size, in 10^9 bytes.
        patience: its `timeout_s` applies to each part of a transfer.
    """

    def __init__(self, folder: str | Path, gigabytes: float, patience: Patience | None = None) -> None:
        if not gigabytes > 0:
            raise ValueError(f"data.cache_gb is {gigabytes}, but it is a size in gigabytes above 0.")
        self.folder, self._patience = Path(folder).expanduser(), patience or Patience()
        self.limit_bytes = int(gigabytes * 1e9)
        self.folder.mkdir(parents=True, exist_ok=True)

    def path_of(self, url: str, stamp: Stamp = UNKNOWN) -> Path:
        """Path of the shard of a URL or a command in that state."""
        return self.folder / f"{self._stem(url)}-{_digest(f'{stamp.size} {stamp.mark}')[:8]}.tar"

    def find(self, url: str, stamp: Stamp = UNKNOWN) -> Path | None:
        """The cached file of a shard, marked as used, or None; a file truncated since it was fetched is removed."""
        path = self.path_of(url, stamp)
        try:
            size = path.stat().st_size
            expected = stamp.size if stamp.size >= 0 else _noted_size(path)
            if size == expected:
                os.utime(path)
                return path
        except FileNotFoundError:
            return None
        _log.warning(
            "The cached copy %s of '%s' has %d bytes instead of %s, so it was damaged on this disk; it is fetched again.",
            path,
            url,
            size,
            expected if expected >= 0 else "those that were noted when it was fetched",
        )
        self._remove(path)
        return None

    def fetch(
        self,
        url: str,
        stamp: Stamp = UNKNOWN,
        wait: bool = True,
        state: Callable[[], Stamp] | None = None,
        tag: str | None = None,
    ) -> Path | None:
        """Fetch a shard unless it is cached.

        Args:
            url: a URL, or `pipe:` with a command.
            stamp: required state of the remote file.
            wait: whether to wait for another process that is fetching it; otherwise None is returned immediately.
            state: looks up the current state of the remote file, to find out whether it was replaced meanwhile.
            tag: the ETag of the required state, if it has one.

        Raises:
            BrokenShardError: if a command fails, if the shard is larger than the cache, or if it was replaced meanwhile.
            OSError: from the file system, or if the number of bytes differs from the stamp.
        """
        path = self.path_of(url, stamp)
        lock = FileLock(path.with_suffix(".lock"), blocking=wait)
        with contextlib.suppress(Timeout), lock:
            if (found := self.find(url, stamp)) is None:
                partial = path.with_suffix(".partial")
                with open(partial, "wb") as target:
                    came_with = self._copy(url, target)
                    target.flush()
                    os.fsync(
                        target.fileno()
                    )  # otherwise a machine crash may leave a file of the right size full of zeros
                size = partial.stat().st_size
                other = tag is not None and came_with not in (None, tag)
                if other or (stamp != UNKNOWN and state is not None and state() != stamp):
                    partial.unlink(missing_ok=True)
                    raise BrokenShardError(
                        f"{url} was replaced while it was fetched; start again, which indexes it anew."
                    )
                if stamp.size not in (-1, size):
                    partial.unlink(missing_ok=True)
                    raise OSError(
                        f"{size:,} bytes came, but the server states {stamp.size:,}: the transfer was cut, or the shard was "
                        "replaced while it was fetched; start again"
                    )
                self._evict(size, url)
                if stamp.size < 0:
                    _size_file(path).write_text(str(size))
                os.replace(partial, path)
                self._remove_other_states(url, path)
                found = path
            return found
        return None

    def _copy(self, url: str, target: Any) -> str | None:
        """Copies a complete shard; returns the ETag with which a web server sent it."""
        tag: str | None = None
        if is_pipe(url):
            from webdataset.gopen import gopen  # local: imports torch

            stream = gopen(url, "rb", bufsize=_COPY_BYTES)
            try:
                shutil.copyfileobj(stream, target, _COPY_BYTES)
                stream.close()
            except OSError as error:  # raised by gopen if the command failed
                raise BrokenShardError(f"The command '{url}' failed ({error}).") from error
        else:
            system, path = file_system(url)
            # One answer of a web server: many of them do not serve ranges, or say so only when asked for a large one.
            block_bytes = 0 if is_http(url) else _COPY_BYTES
            opened = self._patience.answer(
                lambda: system.open(path, "rb", block_size=block_bytes, cache_type="readahead")
            )
            with opened as stream:
                if is_http(url):
                    tag = stream.r.headers.get("ETag")
                while part := self._patience.answer(lambda: _part(stream)):
                    target.write(part)
        return tag

    def _evict(self, size: int, url: str) -> None:
        if size > self.limit_bytes:
            raise BrokenShardError(
                f"'{url}' has {size / 1e9:g} GB, more than the cache of {self.limit_bytes / 1e9:g} GB; raise "
                "data.cache_gb."
            )
        with FileLock(self.folder / "room.lock"):
            files = sorted((file.stat().st_mtime_ns, file.stat().st_size, file) for file in self._shards())
            used = sum(entry[1] for entry in files)
            for _, freed, file in files:
                if used + size <= self.limit_bytes:
                    break
                self._remove(file)
                used -= freed

    def _remove_other_states(self, url: str, kept: Path) -> None:
        for path in self.folder.glob(f"{_escaped(self._stem(url))}-*.tar"):
            if path != kept:
                self._remove(path)

    def _stem(self, url: str) -> str:
        return f"{file_name(url).removesuffix('.tar')}-{_digest(url)}"

    @staticmethod
    def _remove(path: Path) -> None:
        path.unlink(missing_ok=True)
        _size_file(path).unlink(missing_ok=True)

    def _shards(self) -> list[Path]:
        return list(self.folder.glob("*.tar"))


def _part(stream: Any) -> bytes:
    """The next _COPY_BYTES of a stream, which may return fewer at a time; less at its end."""
    parts, left = [], _COPY_BYTES
    while left and (read := stream.read(left)):
        parts.append(read)
        left -= len(read)
    return b"".join(parts)


def _size_file(path: Path) -> Path:
    """File with the size of a shard whose size is not known in advance."""
    return path.with_suffix(".size")


def _noted_size(path: Path) -> int:
    """Size of a shard when it was fetched; -1 if its size file is missing or damaged."""
    try:
        return int(_size_file(path).read_text())
    except (FileNotFoundError, ValueError):
        return -1


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


def _escaped(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)
