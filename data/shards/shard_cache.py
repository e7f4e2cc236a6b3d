"""A bounded folder of remote shards, shared by the processes of a machine.

A file is named after its whole URL, since every data set calls its first shard 00000.tar. What was opened
longest ago goes first; a file that a process has open stays readable to it.
"""

import contextlib
import hashlib
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from filelock import FileLock
from webdataset.gopen import gopen

from data.shards.locations import file_name, file_system, is_pipe
from data.shards.tar_headers import BrokenShardError

_log = logging.getLogger(__name__)
_COPY_BYTES = 1 << 22


class ShardCache:
    """Fetches whole shards and keeps as many as fit.

    Args:
        folder: made if it is missing.
        gigabytes: 10^9 bytes that the shards in it may take together.
    """

    def __init__(self, folder: str | Path, gigabytes: float) -> None:
        if gigabytes <= 0:
            raise ValueError(f"data.cache_gb is {gigabytes}, but it is a size in gigabytes above 0.")
        self.folder = Path(folder).expanduser()
        self.limit_bytes = int(gigabytes * 1e9)
        self.folder.mkdir(parents=True, exist_ok=True)

    def path_of(self, url: str) -> Path:
        """Where a URL's or a command's shard is kept."""
        digest = hashlib.blake2b(url.encode(), digest_size=16).hexdigest()
        return self.folder / f"{file_name(url).removesuffix('.tar')}-{digest}.tar"

    def find(self, url: str) -> Path | None:
        """The file of a shard that is here, marked as used."""
        path = self.path_of(url)
        try:
            os.utime(path)
        except FileNotFoundError:
            return None
        return path

    def fetch(self, url: str, wait: bool = True) -> Path | None:
        """Fetch a shard unless it is here.

        Args:
            url: a URL, or `pipe:` with a command.
            wait: for another process that fetches it already; otherwise None comes back at once.

        Raises:
            BrokenShardError: if a command fails, or if the shard is larger than the whole cache.
            OSError: as the file system raises it.
        """
        path = self.path_of(url)
        lock = FileLock(path.with_suffix(".lock"), blocking=wait)
        with contextlib.suppress(TimeoutError), lock:
            if (found := self.find(url)) is None:
                partial = path.with_suffix(".partial")
                with open(partial, "wb") as target:
                    self._copy(url, target)
                self._make_room(partial.stat().st_size, url)
                os.replace(partial, path)
                found = path
            return found
        return None

    def _copy(self, url: str, target: Any) -> None:
        if is_pipe(url):
            stream = gopen(url, "rb", bufsize=_COPY_BYTES)
            try:
                shutil.copyfileobj(stream, target, _COPY_BYTES)
                stream.close()
            except OSError as error:  # how gopen tells that the command failed
                raise BrokenShardError(f"The command '{url}' failed ({error}).") from error
        else:
            system, path = file_system(url)
            with system.open(path, "rb", block_size=_COPY_BYTES, cache_type="readahead") as stream:
                shutil.copyfileobj(stream, target, _COPY_BYTES)

    def _make_room(self, size: int, url: str) -> None:
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
                file.unlink(missing_ok=True)
                used -= freed

    def _shards(self) -> list[Path]:
        return list(self.folder.glob("*.tar"))
