"""Indexes on disk: `<shard>.tar.index.npz`, beside the shard or in a folder of their own.

A sidecar knows the size and the modification time (of a remote file: its tag) of the tar that it describes,
and does not count where they differ.
"""

import hashlib
import io
import logging
import os
import tempfile
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.shards.locations import file_name, is_remote
from data.shards.scan import SampleFault, ShardIndex

_log = logging.getLogger(__name__)

SIDECAR_VERSION = 2
SIDECAR_SUFFIX = ".index.npz"


class Stamp(NamedTuple):
    """What tells one state of a file from another."""

    size: int
    mark: int
    """Modification time in nanoseconds, or a hash of a remote file's tag."""


def sidecar_path(location: str | Path, index_folder: str | Path | None = None) -> Path:
    """Where a shard's index is kept: beside it, or in `index_folder` under a name made from its full path.

    Raises:
        ValueError: for a remote shard without a folder.
    """
    if index_folder is None:
        if is_remote(str(location)):
            raise ValueError(
                f"'{location}' is remote, so its index needs a local place; set data.index_folder or "
                "data.cache_folder."
            )
        return Path(location).with_name(Path(location).name + SIDECAR_SUFFIX)
    # The full path, since every data set calls its first shard 00000.tar.
    full = str(location) if is_remote(str(location)) else str(Path(location).resolve())
    name = hashlib.blake2b(full.encode(), digest_size=8).hexdigest()
    return Path(index_folder) / f"{file_name(str(location)).removesuffix('.tar')}-{name}{SIDECAR_SUFFIX}"


def load_sidecar(sidecar: Path, location: str, stamp: Stamp | None) -> ShardIndex | None:
    """The stored index, or None if there is none of this version and stamp (None: of any stamp)."""
    try:
        # Read at once: numpy's many small reads make threads wait for each other at the interpreter's lock.
        with np.load(io.BytesIO(sidecar.read_bytes()), allow_pickle=False) as stored:
            version, *known = stored["stamp"].tolist()
            if version != SIDECAR_VERSION or (stamp is not None and tuple(known) != stamp):
                return None
            names = set(stored.files)
            faults = zip(stored["fault_keys"].tolist(), stored["fault_reasons"].tolist(), strict=True)
            return ShardIndex(
                location=location,
                extensions=tuple(stored["extensions"].tolist()),
                offsets=stored["offsets"],
                sizes=stored["sizes"],
                keys=stored["keys"],
                key_ends=stored["key_ends"],
                fingerprint=str(stored["fingerprint"]),
                faults=tuple(SampleFault(key, reason) for key, reason in faults),
                checksums=stored["checksums"] if "checksums" in names else None,
                image_sizes=stored["image_sizes"] if "image_sizes" in names else None,
                sized_by=str(stored["sized_by"]) if "image_sizes" in names else "",
            )
    except (OSError, KeyError, ValueError, zipfile.BadZipFile):
        return None  # absent, or cut short by a full disk: the tar is the truth


def save_sidecar(sidecar: Path, index: ShardIndex, stamp: Stamp) -> None:
    """Write an index; one that cannot be written only costs time at each start."""
    try:
        sidecar.parent.mkdir(parents=True, exist_ok=True)
        # Through a name of its own, since several processes may index the same shard.
        with tempfile.NamedTemporaryFile(dir=sidecar.parent, suffix=".partial", delete=False) as stream:
            np.savez(stream, **_arrays(index, stamp))
        os.chmod(stream.name, 0o644)
        os.replace(stream.name, sidecar)
    except OSError as error:
        _log.warning(
            "The index of %s cannot be saved (%s), so every start scans the shard again; "
            "set data.index_folder to a writable folder.",
            index.location,
            error,
        )


def _arrays(index: ShardIndex, stamp: Stamp) -> dict[str, Any]:
    arrays: dict[str, Any] = {
        "stamp": np.array([SIDECAR_VERSION, *stamp], dtype=np.int64),
        "extensions": np.array(index.extensions, dtype=np.str_),
        "offsets": index.offsets,
        "sizes": index.sizes,
        "keys": index.keys,
        "key_ends": index.key_ends,
        "fingerprint": np.array(index.fingerprint),
        "fault_keys": np.array([fault.key for fault in index.faults], dtype=np.str_),
        "fault_reasons": np.array([fault.reason for fault in index.faults], dtype=np.str_),
    }
    if index.checksums is not None:
        arrays["checksums"] = index.checksums
    if index.image_sizes is not None:
        arrays["image_sizes"] = index.image_sizes
        arrays["sized_by"] = np.array(index.sized_by)
    return arrays
