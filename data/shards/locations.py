"""Locations of shards: folders, globs and brace patterns of local files, fsspec URLs, and commands.

A location is a string: the path of a local file, a URL (`s3://`, `gs://`, `hf://`, `https://`, ...), or
`pipe:` with a shell command that writes the tar to its standard output.
"""

import os
import re
from collections.abc import Sequence
from glob import escape as glob_escape
from glob import glob, has_magic
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import fsspec

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_HOW = "shards are named by a folder, a glob, or a pattern like 'set/{00000..00009}.tar', local or as a URL"


class Stamp(NamedTuple):
    """Identifies the state of a file."""

    size: int
    """Size in bytes; -1 if unknown."""
    mark: int
    """Modification time in nanoseconds, or a hash of a remote file's tag."""


def expand_braces(pattern: str) -> list[str]:
    """Expand `a{00..02}b` and `{x,y}` as in shells and webdataset; numbers keep leading zeros."""
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


def _expanded(pattern: str) -> list[str]:
    """`expand_braces`, but a command is one before: whether commands are trusted is asked of what is written.

    Raises:
        ValueError: for braces that make "pipe:".
    """
    found = expand_braces(pattern)
    if not is_pipe(pattern) and any(map(is_pipe, found)):
        raise ValueError(f"'{pattern}' is a command after its braces are expanded; write pipe: before them.")
    return found


def is_pipe(location: str) -> bool:
    """Whether the location is a command whose output is the shard."""
    return location.startswith("pipe:")


def is_http(location: str) -> bool:
    """Whether the location is a URL of a web server."""
    return location.startswith(("http://", "https://"))


def is_remote(location: str) -> bool:
    """Whether the location is a URL or a command rather than a local path."""
    return "://" in location or location.startswith("pipe:")


def file_name(location: str) -> str:
    """Last part of a location, for messages and sample names."""
    if not is_remote(location):
        return location.rstrip("/").rpartition("/")[2]
    if is_pipe(location):
        words = [word for word in location[5:].split() if word.endswith(".tar")]
        return file_name(words[-1]) if words else "pipe"
    return (urlsplit(location).path or urlsplit(location).netloc).rstrip("/").rpartition("/")[2]


def leaves(path: Path, folder: Path) -> bool:
    """Whether a path, after following links, is outside a folder."""
    return not path.resolve().is_relative_to(folder.resolve())


def linked_folder(folder: Path) -> Path | None:
    """The first symbolic link to a folder below a folder, or None; searches do not follow it."""
    for root, folders, _ in os.walk(folder):
        linked = sorted(name for name in folders if os.path.islink(os.path.join(root, name)))
        if linked:
            return Path(root, linked[0])
    return None


def find_locations(shards: str | Path | Sequence[str | Path], gone: str | None = None) -> list[str]:
    """List the shards of folders, globs, brace patterns, URLs and commands, sorted within each.

    Args:
        shards: one or several of these.
        gone: suffix of sidecars; if given, a missing local shard is listed if its sidecar exists.

    Raises:
        FileNotFoundError: if one of them matches no file; URLs without a glob are only checked when indexed.
        ValueError: for a pattern of which braces make a command.
    """
    patterns = [shards] if isinstance(shards, str | Path) else list(shards)
    lists = [
        _remote_files(expanded) if is_remote(expanded) else _local_files(expanded, gone)
        for pattern in patterns
        for expanded in _expanded(str(pattern))
    ]
    # Each once; within one list they are.
    found = lists[0] if len(lists) == 1 else list(dict.fromkeys(chain.from_iterable(lists)))
    if not found:
        raise FileNotFoundError(
            "No shards were named: give a folder, a glob, or a pattern like 'set/{00000..00009}.tar'."
        )
    return found


def find_shards(shards: str | Path | Sequence[str | Path]) -> list[Path]:
    """`find_locations` for local files."""
    return [Path(location) for location in find_locations(shards)]


def file_system(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the file's path in it.

    Raises:
        ValueError: for an unknown protocol, or if its package is missing.
    """
    try:
        system, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ValueError(
            f"'{url}' cannot be read ({error}); install the package that fsspec names, or read the shard through "
            "'pipe:' and a command."
        ) from error
    return system, path


def _remote_files(pattern: str) -> list[str]:
    if is_pipe(pattern) or not (has_magic(pattern) or pattern.endswith("/")):
        return [pattern]
    system, path = file_system(pattern)
    names = system.glob(path.rstrip("/") + "/*.tar" if pattern.endswith("/") else path)
    if not names:
        raise FileNotFoundError(f"No file matches '{pattern}'; {_HOW}.")
    return sorted(system.unstrip_protocol(name) for name in names)


def _local_files(pattern: str, gone: str | None) -> list[str]:
    path = Path(pattern := os.path.expanduser(pattern))
    if path.is_dir():
        # Not by glob, which takes several times as long for a large set.
        names = os.listdir(path)
        found = [name for name in names if name.endswith(".tar") and not name.startswith(".")]
        if gone is not None:
            listed = (name.removesuffix(gone) for name in names if name.endswith(".tar" + gone))
            found = list({*found, *(name for name in listed if not name.startswith("."))})
        if found:
            prefix = "" if path == Path() else os.path.join(path, "")
            return sorted(prefix + name for name in found)
        pattern = f"{glob_escape(pattern)}/*.tar"
        missing = f"The folder {path} holds no .tar file"
    elif has_magic(pattern):
        missing = f"No file matches '{pattern}'"
    else:
        pattern = glob_escape(pattern)
        missing = f"There is no shard or folder '{path}'"
    files = {str(Path(name)) for name in glob(pattern, recursive=True)}
    if gone is not None:
        files |= {str(Path(name)).removesuffix(gone) for name in glob(pattern + gone, recursive=True)}
    if not files:
        raise FileNotFoundError(f"{missing}; {_HOW}.")
    return sorted(files)
