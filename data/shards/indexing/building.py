"""Finds the packed index of a set of shards, or makes it: divided among all processes that want it at the same time.

The file is named by the list of the shards and holds their stamps, so it is made again when one of them changes. Processes that
share its folder, on one node or many, take turns by locks: each indexes the groups of shards that no other has taken, and one
joins them. Processes that do not share it do the same for themselves.
"""

import contextlib
import errno
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock, Timeout

from data.shards.indexing.packed import PackedIndexes, merge, pack
from data.shards.indexing.request import PACKED_SUFFIX, THREADS, IndexRequest, warn_once
from data.shards.scan import ShardIndex

_GROUPS, _LEAST_IN_GROUP, _MOST_IN_GROUP = 256, 4, 64
_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_KEPT, _KEPT_DAYS = 2, 30
"""An outdated file stays for runs that still read it: on NFS a removed file would end them with a bus error."""


def open_indexes(request: IndexRequest, checked: bool = False) -> Sequence[ShardIndex]:
    """The indexes of the shards, from their packed index if there is one.

    Args:
        request: the shards.
        checked: whether `mark_outdated` was called on this node just before, so that the shards need not be looked at.

    Raises:
        OSError: unless tolerant, if a shard cannot be accessed.
        ValueError: whatever `index_one` raises for a broken shard.
    """
    if not request.is_packed:
        with ThreadPoolExecutor(THREADS if len(request.locations) > 1 else 1) as threads:
            return tuple(threads.map(request.index, request.locations))
    found = _find(request)
    if found is not None and not (checked and not _is_discarded(request)):
        found = found if _is_current(found, request) else None
    return found if found is not None else _build(request)


def mark_outdated(request: IndexRequest) -> None:
    """Compares the packed index with the shards, and marks it for the other processes of this node if they changed."""
    found = _find(request)
    if found is None:
        return
    if _is_current(found, request):
        for folder in request.folders:
            with contextlib.suppress(OSError):
                _mark(folder / request.name).unlink(missing_ok=True)
        return
    for folder in request.folders:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            _mark(folder / request.name).touch()
            break


def drop_packed(folder: Path) -> None:
    """Sets the packed indexes of a folder aside, since its sidecars now say more than they do."""
    for path in folder.glob(f"*{PACKED_SUFFIX}"):
        _set_aside(path)


def _is_discarded(request: IndexRequest) -> bool:
    return any(_mark(folder / request.name).exists() for folder in request.folders)


def _mark(path: Path) -> Path:
    return path.with_suffix(".outdated")


def _find(request: IndexRequest) -> PackedIndexes | None:
    """A packed index of these shards, whatever their states; None if there is none or it is damaged."""
    for folder in request.folders:
        found = _opened(folder / request.name, request.locations)
        if found is not None and _is_sized(found, request):
            return found
    return None


def _is_sized(found: PackedIndexes, request: IndexRequest) -> bool:
    return request.sized in (None, found.table.sized_by)


def _opened(path: Path, locations: Sequence[str]) -> PackedIndexes | None:
    try:
        found = PackedIndexes(path)
    except OSError:
        return None
    except Exception as error:  # json and numpy raise many types for a damaged file
        warn_once(f"The index {path} is damaged ({error}), so it is written again.")
        return None
    return found if found.table.locations == locations else None


def _is_current(found: PackedIndexes, request: IndexRequest) -> bool:
    return found.states() == request.states(request.locations)


def _build(request: IndexRequest) -> Sequence[ShardIndex]:
    reason: OSError | None = None
    for folder in request.folders:
        builder = _Builder(request, folder)
        try:
            found = builder.build()
        except _UnwritableError as error:
            reason = reason or error.cause
            continue
        if reason is not None:
            warn_once(
                f"The index of {len(request.locations)} shards cannot be saved in {request.own_folder} ({reason}), so it "
                f"is kept in {folder}; data.index_folder takes another folder."
            )
        return found
    warn_once(
        f"The index of {len(request.locations)} shards cannot be saved ({reason}), so every start scans them again; set "
        "data.index_folder to a writable folder."
    )
    with ThreadPoolExecutor(THREADS) as threads:
        return tuple(threads.map(request.index, request.locations))


class _Builder:
    """Makes the packed index of some shards in a folder."""

    def __init__(self, request: IndexRequest, folder: Path) -> None:
        self._request, self._path = request, folder / request.name
        self._parts = folder / f"{self._path.stem}-{request.sized or 'plain'}.parts"
        count = len(request.locations)
        size = min(_MOST_IN_GROUP, max(_LEAST_IN_GROUP, count // _GROUPS))
        self._groups = [range(first, min(first + size, count)) for first in range(0, count, size)]
        self._former = _opened(self._path, request.locations)
        self._before = _identity(self._path)

    def build(self) -> PackedIndexes:
        """The packed index.

        Raises:
            _UnwritableError: if the folder cannot be written.
        """
        with _writing():
            self._parts.mkdir(parents=True, exist_ok=True)
        self._make_free_groups()
        for number in range(len(self._groups)):
            self._make(number, wait=True)
        with _locked(self._parts / "all.lock", wait=True):
            found = _opened(self._path, self._request.locations) if self._is_packed_meanwhile() else None
            if found is None or not _is_sized(found, self._request):
                found = self._join()
        shutil.rmtree(self._parts, ignore_errors=True)
        return found

    def _make_free_groups(self) -> None:
        """Index the groups that no other process has taken, from a random one on."""
        count, failed = len(self._groups), False
        first = secrets.randbelow(count)

        def make(number: int) -> None:
            nonlocal failed
            if not failed:
                try:
                    self._make((first + number) % count, wait=False)
                except Exception:
                    failed = True  # raised for the first shard in order, when all groups are visited again

        with ThreadPoolExecutor(THREADS) as threads:
            list(threads.map(make, range(count)))

    def _make(self, number: int, wait: bool) -> None:
        part = self._part(number)
        if part.exists() or self._is_packed_meanwhile():
            return
        with _locked(part.with_suffix(".lock"), wait) as held:
            if held and not part.exists() and not self._is_packed_meanwhile():
                self._write(number)

    def _is_packed_meanwhile(self) -> bool:
        return _identity(self._path) not in (None, self._before)

    def _part(self, number: int) -> Path:
        return self._parts / f"{number:05d}.part"

    def _write(self, number: int, part: PackedIndexes | None = None) -> None:
        """Index a group; what an outdated part knows is used."""
        places = self._groups[number]
        found = [
            self._index(place, self._former, place)
            if part is None
            else self._index(place, part, place - places.start)
            for place in places
        ]
        states = [index.stamp or self._request.state(index.location) for index in found]
        with _writing():
            pack(self._part(number), found, states)

    def _index(self, place: int, known: PackedIndexes | None, known_place: int) -> ShardIndex:
        request, former = self._request, None
        location = request.locations[place]
        if known is not None:
            with contextlib.suppress(ValueError):  # a damaged segment
                former = known[known_place]
            if (
                former is not None
                and _is_sized(known, request)
                and known.state(known_place) == request.state(location)
            ):
                return former
        return request.index(location, former)

    def _join(self) -> PackedIndexes:
        """Join the parts; one that an interrupted start left, and whose shards changed since, is made again."""
        parts = []
        for number, places in enumerate(self._groups):
            locations = self._request.locations[places.start : places.stop]
            part = _opened(self._part(number), locations)
            if (
                part is None
                or not part.is_intact()
                or part.states() != [self._request.state(one) for one in locations]
            ):
                self._write(number, part)
                part = PackedIndexes(self._part(number))
            parts.append(part)
        with _writing():
            if self._former is not None:
                _set_aside(self._path)
            merge(self._path, parts)
            _mark(self._path).unlink(missing_ok=True)
            _remove_old(self._path)
        return PackedIndexes(self._path)


class _UnwritableError(Exception):
    """A folder that cannot take the index."""

    def __init__(self, cause: OSError) -> None:
        super().__init__(str(cause))
        self.cause = cause


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _UnwritableError(error) from error


@contextlib.contextmanager
def _locked(path: Path, wait: bool) -> Iterator[bool]:
    """Yields whether the lock is held; on file systems without locks it always is, and work is done more than once."""
    lock = FileLock(path, blocking=wait)
    held = True
    try:
        lock.acquire()
    except Timeout:
        held = False
    except NotImplementedError:
        pass
    except OSError as error:
        if error.errno not in _WITHOUT_LOCKS:
            raise _UnwritableError(error) from error
    try:
        yield held
    finally:
        lock.release()


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def _set_aside(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.utime(path)
        os.rename(path, path.with_suffix(f".{time.time_ns()}.replaced"))


def _remove_old(path: Path) -> None:
    """Remove files that were set aside for others of the same shards."""
    replaced = sorted(path.parent.glob(f"{path.stem}.*.replaced"), reverse=True)
    for number, old in enumerate(replaced):
        with contextlib.suppress(FileNotFoundError):
            if number >= _KEPT or time.time() - old.stat().st_mtime > _KEPT_DAYS * 86400:
                old.unlink()
