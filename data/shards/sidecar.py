"""Indexes on disk: `<shard>.tar.index.npz`, next to the shard or in a separate folder.

A sidecar stores the size and the modification time (for a remote file its tag) of its tar, and is ignored if they differ.
"""

import hashlib
import io
import logging
import os
import re
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from data.shards.locations import Stamp, file_name, is_remote
from data.shards.scan import SampleFault, ShardIndex

_log = logging.getLogger(__name__)

SIDECAR_VERSION = 3
"""3: data after an end-of-archive mark, links and dotted keys are faults."""
SIDECAR_SUFFIX = ".index.npz"
_FINGERPRINT = re.compile("[0-9a-f]{32}")


def sidecar_path(location: str | Path, index_folder: str | Path | None = None) -> Path:
    """Path of a shard's index: next to it, or in `index_folder` under a name derived from its full path.

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
    # The full path, since the first shard of every data set is named 00000.tar.
    full = str(location) if is_remote(str(location)) else str(Path(location).resolve())
    name = hashlib.blake2b(full.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()
    return (
        Path(index_folder).expanduser()
        / f"{file_name(str(location)).removesuffix('.tar')}-{name}{SIDECAR_SUFFIX}"
    )


def load_sidecar(
    sidecar: Path, location: str, stamp: Stamp | None, version: int = SIDECAR_VERSION
) -> ShardIndex | None:
    """The stored index, or None if it is missing, invalid, or of another version or stamp (None accepts any stamp)."""
    try:
        # Read at once: numpy's many small reads make threads contend for the GIL.
        content = io.BytesIO(sidecar.read_bytes())
        with zipfile.ZipFile(content) as archive:
            if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
                return None  # not written by us, and could unpack to any size
        with np.load(content, allow_pickle=False) as stored:
            found, *known = stored["stamp"].tolist()
            if found != version or (stamp is not None and tuple(known) != stamp):
                return None
            names = set(stored.files)
            faults = zip(stored["fault_keys"].tolist(), stored["fault_reasons"].tolist(), strict=True)
            index = ShardIndex(
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
                stamp=Stamp(*known),
            )
    except Exception:  # numpy and zipfile raise many types for a damaged file
        return None  # missing or truncated: the tar is scanned again
    return index if makes_sense(index) else None


def makes_sense(index: ShardIndex) -> bool:
    """Whether all offsets of an index are within its arrays and its file; indexes shipped with shards are untrusted."""
    shape = index.offsets.shape
    tables: list[tuple[Any, tuple[int, ...], str]] = [
        (index.offsets, (len(index), len(index.extensions)), "int64"),
        (index.sizes, shape, "int64"),
        (index.keys, (index.keys.size,), "uint8"),
        (index.key_ends, (len(index),), "int64"),
    ]
    if index.checksums is not None:
        tables.append((index.checksums, shape, "uint32"))
    if index.image_sizes is not None:
        tables.append((index.image_sizes, (len(index), 2), "int64"))
    if any(table.shape != expected or table.dtype != dtype for table, expected, dtype in tables):
        return False
    if not _FINGERPRINT.fullmatch(index.fingerprint):
        return False
    if index.stamp is None or (len(index) and index.key_ends[-1] != index.keys.size):
        return False
    end = index.stamp.size if index.stamp.size >= 0 else np.iinfo(np.int64).max
    present = index.offsets >= 0
    return bool(
        (np.diff(index.key_ends, prepend=0) > 0).all()
        and (index.sizes[present] >= 0).all()
        and (index.offsets[present] <= end - index.sizes[present]).all()
    )


def save_sidecar(sidecar: Path, index: ShardIndex, stamp: Stamp) -> None:
    """Write an index; a failure is only logged, because it merely slows down the next start."""
    try:
        sidecar.parent.mkdir(parents=True, exist_ok=True)
        # Via a unique name, since several processes may index the same shard.
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
