"""The index of shards: for every sample its key, and for every member where it lies and how long it is.

One pass over the headers of each tar, kept beside it as `<shard>.tar.index.npz`. The sidecar knows the size
and the modification time of the tar that it describes and is rebuilt when they differ.
"""

import hashlib
import logging
import os
import re
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.shards.tar_headers import BrokenShardError, TarMember, tar_members

_log = logging.getLogger(__name__)

SIDECAR_VERSION = 1
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
# WebDataset's rule: the key ends at the first dot of the file's name; what follows says what the member is.
_KEY_AND_EXTENSION = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")


def expand_braces(pattern: str) -> list[str]:
    """`a{00..02}b` and `{x,y}` as in a shell and in webdataset: numbers keep their leading zeros."""
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    numbers = _RANGE.fullmatch(match[1])
    if numbers:
        first, last = numbers[1], numbers[2]
        choices = [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    else:
        choices = match[1].split(",")
    before, after = pattern[: match.start()], pattern[match.end() :]
    return [expanded for choice in choices for expanded in expand_braces(before + choice + after)]


def find_shards(shards: str | Path | Sequence[str | Path]) -> list[Path]:
    """The tar files that a folder, a glob, a brace pattern, or a list of these names; sorted within each.

    Raises:
        FileNotFoundError: if one of them names no file.
    """
    patterns = [shards] if isinstance(shards, str | Path) else list(shards)
    found: dict[Path, None] = {}
    for pattern in patterns:
        for expanded in expand_braces(str(pattern)):
            for path in _files_of(os.path.expanduser(expanded)):
                found[path] = None
    if not found:
        raise FileNotFoundError(
            "No shards were named: data.shards takes a folder, a glob, or a pattern like "
            "'set/{00000..00009}.tar'."
        )
    return list(found)


def _files_of(pattern: str) -> list[Path]:
    path = Path(pattern)
    if path.is_dir():
        files = sorted(path.glob("*.tar"))
        missing = f"The folder {path} holds no .tar file"
    elif has_magic(pattern):
        files = sorted(Path(name) for name in glob(pattern, recursive=True))
        missing = f"No file matches '{pattern}'"
    else:
        files = [path] if path.is_file() else []
        missing = f"There is no shard or folder '{path}'"
    if not files:
        raise FileNotFoundError(
            f"{missing}; set data.shards to a folder of shards, a glob, or a pattern like "
            f"'set/{{00000..00009}}.tar'."
        )
    return files


@dataclass(frozen=True)
class ShardIndex:
    """Where the samples of one shard lie.

    `offsets` and `sizes` are (samples, extensions), int64, in bytes; -1 where a sample has no such member.
    """

    path: Path
    extensions: tuple[str, ...]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    keys: NDArray[np.uint8]
    """All keys as UTF-8, one after another: strings of Python would take ten times the memory."""
    key_ends: NDArray[np.int64]
    fingerprint: str
    """Of keys, members and sizes, not of time or folder: a copied shard keeps it."""

    def __len__(self) -> int:
        """Samples in this shard."""
        return len(self.offsets)

    def key(self, sample: int) -> str:
        """The key of a sample."""
        start = int(self.key_ends[sample - 1]) if sample else 0
        return self.keys[start : int(self.key_ends[sample])].tobytes().decode("utf-8", "surrogateescape")

    def column(self, extension: str) -> int | None:
        """Where this extension stands in `offsets` and `sizes`, None if no sample has it."""
        return self.extensions.index(extension) if extension in self.extensions else None


def scan_shard(path: Path) -> ShardIndex:
    """Index one tar by its headers.

    Raises:
        BrokenShardError: if the tar is not whole, if members of a sample do not stand together, or if one
            occurs twice.
    """
    samples: dict[str, dict[str, TarMember]] = {}
    current = ""
    for member in tar_members(path):
        match = _KEY_AND_EXTENSION.fullmatch(member.name)
        if match is None:
            continue  # a name without a dot or beginning with one is no sample for webdataset either
        key, extension = match[1], match[2].lower()
        if key != current and key in samples:
            raise BrokenShardError(
                f"{path}: the members of '{key}' do not stand together; write the shard again, sorted by key."
            )
        current = key
        members = samples.setdefault(key, {})
        if extension in members:
            raise BrokenShardError(
                f"{path}: '{key}' has the member '{extension}' twice; write the shard again with unique keys."
            )
        members[extension] = member
    return _build(path, samples)


def _build(path: Path, samples: dict[str, dict[str, TarMember]]) -> ShardIndex:
    extensions = tuple(sorted({extension for members in samples.values() for extension in members}))
    offsets = np.full((len(samples), len(extensions)), -1, dtype=np.int64)
    sizes = np.full_like(offsets, -1)
    columns = {extension: column for column, extension in enumerate(extensions)}
    for row, members in enumerate(samples.values()):
        for extension, member in members.items():
            offsets[row, columns[extension]], sizes[row, columns[extension]] = member.offset, member.size
    encoded = [key.encode("utf-8", "surrogateescape") for key in samples]
    keys = np.frombuffer(b"".join(encoded), dtype=np.uint8)
    key_ends = np.fromiter(accumulate(map(len, encoded)), dtype=np.int64, count=len(encoded))
    digest = hashlib.blake2b("\0".join(extensions).encode(), digest_size=16)
    for array in (offsets, sizes, keys, key_ends):
        digest.update(np.ascontiguousarray(array).tobytes())
    return ShardIndex(path, extensions, offsets, sizes, keys, key_ends, digest.hexdigest())


def sidecar_path(path: Path, index_folder: str | Path | None = None) -> Path:
    """Where a shard's index is kept: beside it, or in `index_folder` under a name made from its full path."""
    if index_folder is None:
        return path.with_name(path.name + ".index.npz")
    # The full path, since every data set calls its first shard 00000.tar.
    name = hashlib.blake2b(str(path.resolve()).encode(), digest_size=8).hexdigest()
    return Path(index_folder) / f"{path.stem}-{name}.index.npz"


def index_shard(path: Path, index_folder: str | Path | None = None) -> ShardIndex:
    """The index of one shard: its sidecar if that describes the file of now, otherwise scanned and saved."""
    sidecar = sidecar_path(path, index_folder)
    status = path.stat()
    stamp = np.array([SIDECAR_VERSION, status.st_size, status.st_mtime_ns], dtype=np.int64)
    loaded = _load_sidecar(sidecar, path, stamp)
    if loaded is not None:
        return loaded
    index = scan_shard(path)
    _save_sidecar(sidecar, index, stamp)
    return index


def _load_sidecar(sidecar: Path, path: Path, stamp: NDArray[np.int64]) -> ShardIndex | None:
    try:
        with np.load(sidecar, allow_pickle=False) as stored:
            if not np.array_equal(stored["stamp"], stamp):
                return None
            return ShardIndex(
                path=path,
                extensions=tuple(stored["extensions"].tolist()),
                offsets=stored["offsets"],
                sizes=stored["sizes"],
                keys=stored["keys"],
                key_ends=stored["key_ends"],
                fingerprint=str(stored["fingerprint"]),
            )
    except (OSError, KeyError, ValueError, zipfile.BadZipFile):
        return None  # absent, or cut short by a full disk: the tar is the truth


def _save_sidecar(sidecar: Path, index: ShardIndex, stamp: NDArray[np.int64]) -> None:
    try:
        sidecar.parent.mkdir(parents=True, exist_ok=True)
        # Through a name of its own, since several processes may index the same shard.
        with tempfile.NamedTemporaryFile(dir=sidecar.parent, suffix=".partial", delete=False) as stream:
            np.savez(
                stream,
                stamp=stamp,
                extensions=np.array(index.extensions, dtype=np.str_),
                offsets=index.offsets,
                sizes=index.sizes,
                keys=index.keys,
                key_ends=index.key_ends,
                fingerprint=np.array(index.fingerprint),
            )
        os.chmod(stream.name, 0o644)
        os.replace(stream.name, sidecar)
    except OSError as error:
        _log.warning(
            "The index of %s cannot be saved (%s), so every start scans the shard again; "
            "set data.index_folder to a writable folder.",
            index.path,
            error,
        )


@dataclass(frozen=True)
class ShardSet:
    """The indexes of all shards of a data set, in order."""

    shards: tuple[ShardIndex, ...]

    @classmethod
    def open(
        cls, shards: str | Path | Sequence[str | Path], index_folder: str | Path | None = None
    ) -> "ShardSet":
        """Find and index shards.

        Raises:
            FileNotFoundError: if there is none.
            BrokenShardError: if one is not a whole tar, or if none holds a sample.
        """
        found = cls(tuple(index_shard(path, index_folder) for path in find_shards(shards)))
        if not sum(found.sizes):
            raise BrokenShardError(
                f"{len(found.shards)} shards were found, from {found.shards[0].path} on, but they hold no "
                "sample."
            )
        return found

    @property
    def sizes(self) -> list[int]:
        """Samples in each shard."""
        return [len(shard) for shard in self.shards]

    @property
    def fingerprint(self) -> str:
        """Of all samples in their order, the same wherever the folder lies."""
        return _digest(f"{shard.path.name} {shard.fingerprint}" for shard in self.shards)

    def names(self) -> list[str]:
        """A unique name for each shard: its path without '.tar', below the folder that all have in common."""
        paths = [shard.path.resolve() for shard in self.shards]
        common = Path(os.path.commonpath([path.parent for path in paths]))
        return [path.relative_to(common).with_suffix("").as_posix() for path in paths]


def _digest(lines: Iterable[str]) -> str:
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()
