"""The folder that a set is written to: on a disk, or at any URL that fsspec writes (`s3://`, `gs://`, ...)."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from data.prepare.common.owner import Owner
from data.shards.locations import file_system, is_remote

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from data.shards.remote.patience import Patience

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_UNFINISHED = ".making-"
_OWNER_FILE = "owner.json"
_ABANDONED_SECONDS = 600.0
"""After this time without a change, a temporary folder of another machine is one of a killed run."""
_UPLOAD_BYTES_PER_SECOND = 1e6
"""An upload may be this slow before it counts as failed."""
_WITHOUT_FOLDERS = {"s3", "gs", "abfs", "az", "oci", "oss", "hf"}
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.2, 30.0


class SetFolder(ABC):
    """Files of a set by name; a name may have one folder (`.claims/00000-0`). Every file appears complete or not at all."""

    @abstractmethod
    def names(self) -> dict[str, int]:
        """Sizes of the files by name, without those in folders; {} if there is no such folder yet."""

    @abstractmethod
    def read(self, name: str) -> bytes | None:
        """The content of a file, or None."""

    @abstractmethod
    def size(self, name: str) -> int | None:
        """Bytes of a file, or None."""

    @abstractmethod
    def write(self, name: str, content: bytes) -> None:
        """Writes a small file."""

    @abstractmethod
    def create(self, name: str, content: bytes) -> bool:
        """Writes a small file unless it exists; of several processes exactly one succeeds."""

    @abstractmethod
    def beat(self, name: str, content: bytes) -> None:
        """Changes the `state` of a file that this process created with this content."""

    @abstractmethod
    def state(self, name: str) -> Hashable | None:
        """A value that `beat` changes; None if there is no such file."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Removes a file, or an empty folder; not an error if there is none, or if the folder is not empty."""

    @abstractmethod
    def publish(self, file: Path, name: str) -> None:
        """Moves a file of `temporary_folder` into the set."""

    @abstractmethod
    def temporary_folder(self) -> AbstractContextManager[Path]:
        """Context of a temporary folder on a disk."""

    @abstractmethod
    def remove_abandoned(self) -> None:
        """Removes the temporary folders of killed runs; for a set that is complete."""

    @abstractmethod
    def location(self, name: str) -> str:
        """Path or URL of a file."""


@dataclass(frozen=True)
class LocalFolder(SetFolder):
    """A folder of a disk, which several machines may share."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def names(self) -> dict[str, int]:
        found = {}
        with suppress(FileNotFoundError), os.scandir(self.path) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # a temporary file, gone by now
                    if entry.is_file():
                        found[entry.name] = entry.stat().st_size
        return found

    def read(self, name: str) -> bytes | None:
        try:
            return (self.path / name).read_bytes()
        except FileNotFoundError:
            return None

    def size(self, name: str) -> int | None:
        try:
            return (self.path / name).stat().st_size
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes) -> None:
        os.replace(self._written(name, content), self.path / name)

    def create(self, name: str, content: bytes) -> bool:
        if (self.path / name).exists():
            return False
        temporary = self._written(name, content)
        try:
            # Unlike O_EXCL, it shows the complete content at once; both are atomic on network file systems.
            os.link(temporary, self.path / name)
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            with suppress(FileExistsError), open(self.path / name, "xb") as stream:
                stream.write(content)
                return True
            return False
        finally:
            temporary.unlink()
        return True

    def _written(self, name: str, content: bytes) -> Path:
        """A temporary file beside the one of that name."""
        file = self.path / name
        while True:
            file.parent.mkdir(parents=True, exist_ok=True)
            # Another process may remove the empty folder of the claims in between.
            with suppress(FileNotFoundError):
                descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}-")
                break
        with open(descriptor, "wb") as stream:
            stream.write(content)
        os.chmod(temporary, 0o644)
        return Path(temporary)

    def beat(self, name: str, content: bytes) -> None:
        os.utime(self.path / name)

    def state(self, name: str) -> Hashable | None:
        try:
            # NFS asks the server at each opening, and at a stat only once a minute.
            with (self.path / name).open("rb") as stream:
                return os.fstat(stream.fileno()).st_mtime_ns
        except FileNotFoundError:
            return None

    def remove(self, name: str) -> None:
        path = self.path / name
        with suppress(OSError):
            path.rmdir() if path.is_dir() else path.unlink()

    def publish(self, file: Path, name: str) -> None:
        os.replace(file, self.path / name)

    @contextmanager
    def temporary_folder(self) -> Iterator[Path]:
        # On the same disk, so that files can be moved; another command may remove it if this process is taken for dead.
        with tempfile.TemporaryDirectory(
            dir=self.path, prefix=_UNFINISHED, ignore_cleanup_errors=True
        ) as name:
            (Path(name) / _OWNER_FILE).write_bytes(Owner.new().content)
            yield Path(name)

    def remove_abandoned(self) -> None:
        for folder in self.path.glob(f"{_UNFINISHED}*"):
            with suppress(OSError):
                owner_file = folder / _OWNER_FILE
                owner = Owner.parse(owner_file.read_bytes()) if owner_file.exists() else None
                running = None if owner is None else owner.is_running()
                if running is None:
                    newest = max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
                    running = time.time() - newest < _ABANDONED_SECONDS
                if not running:
                    shutil.rmtree(folder, ignore_errors=True)

    def location(self, name: str) -> str:
        return str(self.path / name)


@dataclass(frozen=True)
class RemoteFolder(SetFolder):
    """A folder of an object store, or of another file system that fsspec writes.

    Failures are retried as those of reading: each answer has `timeout_s`, and tries go on for `retry_s`.
    """

    url: str
    """Without a slash at its end."""
    patience: Patience

    def __str__(self) -> str:
        return self.url

    def _file(self, name: str) -> tuple[Any, str]:
        """File system and path, without a listing that was kept."""
        system, path = file_system(f"{self.url}/{name}" if name else self.url)
        system.invalidate_cache()
        return system, path

    def names(self) -> dict[str, int]:
        system, path = self._file("")
        try:
            found = self.patience.call(lambda: system.ls(path, detail=True), self.url)
        except FileNotFoundError:
            return {}
        return {one["name"].rpartition("/")[2]: one["size"] for one in found if one["type"] == "file"}

    def read(self, name: str) -> bytes | None:
        system, path = self._file(name)
        try:
            content: bytes = self.patience.call(lambda: system.cat_file(path), self.location(name))
        except FileNotFoundError:
            return None
        return content

    def size(self, name: str) -> int | None:
        system, path = self._file(name)
        try:
            size: int = self.patience.call(lambda: system.info(path)["size"], self.location(name))
        except FileNotFoundError:
            return None
        return size

    def write(self, name: str, content: bytes) -> None:
        system, path = self._file(name)
        self._make_parent(system, path)
        self._written(lambda: system.pipe_file(path, content), name)

    def create(self, name: str, content: bytes) -> bool:
        system, path = self._file(name)
        self._make_parent(system, path)

        def send() -> bool:
            try:
                # If-None-Match of S3, ifGenerationMatch of Google.
                system.pipe_file(path, content, mode="create")
            except FileExistsError:
                return False
            return True

        # An answer may get lost, and the next try then finds our own file.
        return self._written(send, name) or self.read(name) == content

    def beat(self, name: str, content: bytes) -> None:
        system, path = self._file(name)
        beaten = content + b"\n" + str(time.time_ns()).encode()
        self.patience.answer(lambda: system.pipe_file(path, beaten))

    def state(self, name: str) -> Hashable | None:
        return self.read(name)

    def remove(self, name: str) -> None:
        system, path = self._file(name)
        with suppress(Exception):  # what stays is ignored
            self.patience.answer(lambda: system.rm_file(path))

    def publish(self, file: Path, name: str) -> None:
        system, path = self._file(name)
        size = file.stat().st_size
        self._make_parent(system, path)

        def send() -> None:
            system.put_file(str(file), path)
            system.invalidate_cache()
            arrived = system.info(path)["size"]
            if arrived != size:
                raise OSError(f"{arrived:,} of {size:,} bytes arrived")

        self._written(send, name, self.patience.timeout_s + size / _UPLOAD_BYTES_PER_SECOND)

    @contextmanager
    def temporary_folder(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="sdxs-making-") as name:
            yield Path(name)

    def remove_abandoned(self) -> None:
        """None are at a URL."""

    def location(self, name: str) -> str:
        return f"{self.url}/{name}"

    def _make_parent(self, system: Any, path: str) -> None:
        """Object stores have no folders; other file systems need them before a file."""
        parent = path.rpartition("/")[0]
        protocols = {system.protocol} if isinstance(system.protocol, str) else set(system.protocol)
        if not protocols & _WITHOUT_FOLDERS:
            self._written(lambda: system.makedirs(parent, exist_ok=True), "")

    def _written(self, send: Callable[[], _T], name: str, timeout_s: float | None = None) -> _T:
        """Calls until it succeeds, as `Patience.retry` does for reading."""
        patience = self.patience if timeout_s is None else replace(self.patience, timeout_s=timeout_s)
        end, pause = time.monotonic() + patience.retry_s, _FIRST_PAUSE_SECONDS
        while True:
            try:
                return patience.answer(send)
            except (PermissionError, FileNotFoundError, FileExistsError):
                raise
            except Exception as error:  # file system packages define their own exceptions
                reason = f"{type(error).__name__}: {error}"
                left = end - time.monotonic()
                if pause > left:
                    raise OSError(f"'{self.location(name)}' cannot be written ({reason})") from error
                _log.warning(
                    "'%s' cannot be written (%s); next try in %.1f s, for at most %.0f s more (--remote_retry_s).",
                    self.location(name),
                    reason,
                    pause,
                    left,
                )
                time.sleep(pause)
                pause = min(4 * pause, _LONGEST_PAUSE_SECONDS)


def open_set_folder(out: str, patience: Patience) -> SetFolder:
    """The folder that `--out` names.

    Args:
        out: a path, or a URL.
        patience: for a URL.

    Raises:
        ValueError: for a URL of an unknown kind, or whose package is missing.
    """
    if out.startswith("file://"):
        out = out.removeprefix("file://")
    if not is_remote(out):
        return LocalFolder(Path(out))
    file_system(out)
    return RemoteFolder(out.rstrip("/"), patience)
