"""The file of a packed index: a JSON header and tables of numbers in the layout of safetensors, so reading it runs nothing."""

import json
import mmap
import os
import tempfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.shards.indexing.location_list import LocationList
from data.shards.indexing.table import Kind, ShardTable
from data.shards.locations import Stamp
from data.shards.scan import SampleFault, ShardIndex

_FORMAT, _VERSION = "sdxs-lightning packed index", "1"
_DTYPES = {"I64": np.int64, "I32": np.int32, "U32": np.uint32, "U8": np.uint8}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
# 8 bytes each first, so that every table is aligned; `segments` has whole multiples of 8 bytes.
_TABLES = {
    "counts": ("I64", 1),
    "ends": ("I64", 1),
    "states": ("I64", 2),
    "segment_ends": ("I64", 1),
    "location_ends": ("I64", 1),
    "latent_sizes": ("I64", 2),
    "segments": ("U8", 1),
    "image_sizes": ("I32", 2),
    "kind_of": ("I32", 1),
    "segment_sums": ("U32", 1),
    "fingerprints": ("U8", 2),
    "stamped": ("U8", 1),
    "linked": ("U8", 1),
    "locations": ("U8", 1),
    "faults": ("U8", 1),
}
_MAX_HEADER_BYTES = 1 << 28


@dataclass(frozen=True)
class PackedTable:
    """The columns of a packed index."""

    table: ShardTable
    states: NDArray[np.int64]
    """(n, 2): stamp of each shard when it was indexed."""
    stamped: NDArray[np.uint8]
    """(n,): whether the index is of that state, rather than of an earlier one of a shard that broke."""
    linked: NDArray[np.uint8]
    """(n,): whether the shard is a symbolic link."""
    segment_ends: NDArray[np.int64]
    segment_sums: NDArray[np.uint32]
    """(n,): CRC-32 of each segment."""

    @classmethod
    def of(cls, indexes: Sequence[ShardIndex], states: Sequence[Stamp]) -> "PackedTable":
        """The columns of indexes in memory.

        Args:
            indexes: of the shards.
            states: stamp of each shard as it is now.
        """
        segments = [segment_of(index) for index in indexes]
        return cls(
            ShardTable.of(indexes),
            np.array(states, dtype=np.int64).reshape(-1, 2),
            np.array([index.stamp == state for index, state in zip(indexes, states, strict=True)], np.uint8),
            np.array([os.path.islink(index.location) for index in indexes], np.uint8),
            np.cumsum([len(segment) for segment in segments], dtype=np.int64),
            np.array([zlib.crc32(segment) for segment in segments], dtype=np.uint32),
        )

    @classmethod
    def joined(cls, parts: Sequence["PackedTable"]) -> "PackedTable":
        ends = [int(one.segment_ends[-1]) for one in parts]
        firsts = (np.cumsum(ends) - ends).tolist()
        return cls(
            ShardTable.joined([one.table for one in parts]),
            np.concatenate([one.states for one in parts]),
            np.concatenate([one.stamped for one in parts]),
            np.concatenate([one.linked for one in parts]),
            np.concatenate([one.segment_ends + first for one, first in zip(parts, firsts, strict=True)]),
            np.concatenate([one.segment_sums for one in parts]),
        )

    def arrays(self) -> dict[str, NDArray[Any]]:
        """All tables except the segments, by name."""
        table = self.table
        locations = LocationList.of(table.locations)
        faults = [[number, fault.key, fault.reason] for number, fault in table.faults]
        arrays: dict[str, NDArray[Any]] = {
            "counts": table.counts,
            "ends": table.ends,
            "states": self.states,
            "segment_ends": self.segment_ends,
            "location_ends": locations.ends,
            "latent_sizes": table.latent_sizes,
            "kind_of": table.kind_of,
            "segment_sums": self.segment_sums,
            "fingerprints": table.fingerprints,
            "stamped": self.stamped,
            "linked": self.linked,
            "locations": locations.text,
            "faults": np.frombuffer(json.dumps(faults).encode(), dtype=np.uint8),
        }
        if table.image_sizes is not None:
            arrays["image_sizes"] = table.image_sizes.astype(np.int32)
        return arrays


def write_packed(
    path: Path, columns: PackedTable, segments: Iterable[bytes | memoryview], lasting: bool = True
) -> None:
    """Writes a packed index atomically.

    Args:
        path: the file; its folder exists.
        columns: all of it except the segments.
        segments: their bytes, in any parts.
        lasting: whether to wait until the disk has them, which a crash of the machine cannot undo.
    """
    arrays = columns.arrays()
    length = int(columns.segment_ends[-1])
    header: dict[str, Any] = {}
    end = 0
    for name in _TABLES:
        if name == "segments":
            shape, count, dtype = [length], length, "U8"
        elif name in arrays:
            shape, count = list(arrays[name].shape), arrays[name].nbytes
            dtype = _NAMES[arrays[name].dtype]
        else:
            continue
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + count]}
        end += count
    kinds = json.dumps([[kind.extensions, kind.full, kind.checksums] for kind in columns.table.kinds])
    metadata = {"format": _FORMAT, "version": _VERSION, "kinds": kinds, "sized_by": columns.table.sized_by}
    header["__metadata__"] = metadata | {"tables_crc32": _sum(arrays, metadata)}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".partial", delete=False) as stream:
        try:
            stream.write(len(text).to_bytes(8, "little") + text)
            for name in header:
                if name == "segments":
                    stream.writelines(segments)
                elif name in arrays:
                    stream.write(np.ascontiguousarray(arrays[name]).data)
            stream.flush()
            if lasting:
                os.fsync(stream.fileno())
        except BaseException:
            os.unlink(stream.name)
            raise
    os.chmod(stream.name, 0o644)
    os.replace(stream.name, path)


def segment_of(index: ShardIndex) -> bytes:
    """Byte ranges, checksums and keys of a shard."""
    arrays = [index.offsets, index.sizes, index.key_ends]
    parts = [np.ascontiguousarray(array, np.int64).tobytes() for array in arrays]
    if index.checksums is not None:
        parts.append(np.ascontiguousarray(index.checksums, np.uint32).tobytes())
    segment = b"".join([*parts, index.keys.tobytes()])
    return segment + bytes(-len(segment) % 8)


def read_packed(data: mmap.mmap) -> tuple[PackedTable, NDArray[np.uint8], str]:
    """The columns of a packed index, its segments and its checksum, as views of the file.

    Raises:
        ValueError: if it is not a complete packed index; KeyError, TypeError or others for a header of another form.
    """
    arrays, metadata = _tables(data)
    return _columns(arrays, metadata), arrays["segments"], metadata["tables_crc32"]


def _tables(data: mmap.mmap) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """The tables of a file as views of its bytes, and its metadata.

    Raises:
        ValueError: unless they are all there, of known types, and fill the file.
    """
    length = int.from_bytes(data[:8], "little")
    if length > min(_MAX_HEADER_BYTES, len(data) - 8):
        raise ValueError("its header is cut")
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__")
    if (metadata["format"], metadata["version"]) != (_FORMAT, _VERSION):
        raise ValueError("it is of another version")
    arrays: dict[str, NDArray[Any]] = {}
    end = 0
    for name, (dtype, dimensions) in _TABLES.items():
        if name == "image_sizes" and name not in header:
            continue
        entry = header.pop(name)
        shape = [int(side) for side in entry["shape"]]
        first, last = entry["data_offsets"]
        size = np.dtype(_DTYPES[dtype]).itemsize
        count = int(np.prod(shape, dtype=object))
        if entry["dtype"] != dtype or len(shape) != dimensions or min(shape) < 0 or first != end:
            raise ValueError(f"its table {name} is {entry}")
        if last != end + count * size or 8 + length + last > len(data):
            raise ValueError(f"its table {name} is {entry}")
        arrays[name] = np.frombuffer(data, _DTYPES[dtype], count, 8 + length + end).reshape(shape)
        end = last
    if header or 8 + length + end != len(data):
        raise ValueError(f"it has {len(data):,} bytes, and its header describes {8 + length + end:,}")
    if _sum(arrays, metadata) != metadata["tables_crc32"]:
        raise ValueError("its checksum is wrong")
    return arrays, metadata


def _columns(arrays: dict[str, NDArray[Any]], metadata: dict[str, str]) -> PackedTable:
    """Raises ValueError for tables that contradict each other."""
    count, segment_ends, location_ends = (
        len(arrays["counts"]),
        arrays["segment_ends"],
        arrays["location_ends"],
    )
    kinds = tuple(
        Kind(tuple(names), tuple(full), bool(checksums))
        for names, full, checksums in json.loads(metadata["kinds"])
    )
    widths = np.array([16 * len(one.extensions) + 4 * len(one.extensions) * one.checksums for one in kinds])
    kind_of, counts, image_sizes = arrays["kind_of"], arrays["counts"], arrays.get("image_sizes")
    lengths = np.diff(segment_ends, prepend=0)
    shapes = {
        "states": (count, 2),
        "fingerprints": (count, 16),
        "latent_sizes": (len(arrays["latent_sizes"]), 3),
    }
    if not (
        count
        and all(arrays[name].shape == shape for name, shape in shapes.items())
        and all(len(arrays[name]) == count for name in ("ends", "kind_of", "stamped", "linked"))
        and len(segment_ends) == len(location_ends) == len(arrays["segment_sums"]) == count
        and ((kind_of >= 0) & (kind_of < len(kinds))).all()
        and (counts >= 0).all()
        and (lengths >= counts * (widths[kind_of] + 8)).all()
        and segment_ends[-1] == len(arrays["segments"])
        and (np.diff(location_ends, prepend=0) > 0).all()
        and location_ends[-1] == len(arrays["locations"])
        and (image_sizes is None or image_sizes.shape == (counts.sum(), 2))
    ):
        raise ValueError("its tables contradict each other")
    faults = tuple(
        (int(number), SampleFault(str(key), str(reason)))
        for number, key, reason in json.loads(arrays["faults"].tobytes())
    )
    table = ShardTable(
        LocationList(arrays["locations"], location_ends),
        counts,
        arrays["ends"],
        arrays["fingerprints"],
        kinds,
        kind_of,
        faults,
        arrays["latent_sizes"],
        image_sizes,
        metadata["sized_by"],
    )
    return PackedTable(
        table, arrays["states"], arrays["stamped"], arrays["linked"], segment_ends, arrays["segment_sums"]
    )


def _sum(arrays: dict[str, NDArray[Any]], metadata: dict[str, str]) -> str:
    found = zlib.crc32(json.dumps([metadata["kinds"], metadata["sized_by"]]).encode())
    for name in _TABLES:
        if name in arrays and name != "segments":
            found = zlib.crc32(np.ascontiguousarray(arrays[name]).data, found)
    return f"{found:08x}"
