"""A set that is made shard by shard: each whole or not at all, and each a function of its number alone, so that any number of
processes can share them and a run that was cut off loses no more than the shards it was at.

Beside `00000.tar` stand two sidecars with the names that img2dataset gives them: `00000.parquet`, a row a sample, and
`00000_stats.json`, what was read, kept and left out, with size and SHA-256 of the tar. The latter is written last: where it is
and fits, the shard is done.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data.prepare.common.settings_file import write_json, write_text
from data.shards.decoders import JSON_MEMBER
from data.shards.writer import Member, ShardWriter

SUMS_FILE = "SHA256SUMS"
CHECKSUMS_FIELD = "crc32"
"""In the json member: CRC-32 of the sample's other members, by extension. A tar has checksums of its headers only."""
_UNFINISHED = ".making-"
_ROW_FIELDS = ("width", "height", "original_width", "original_height", "crop_top", "crop_left")


@dataclass(frozen=True)
class Prepared:
    """A sample to write."""

    key: str
    members: Mapping[str, bytes | str]
    """Without json."""
    fields: Mapping[str, Any]
    """Of the json member; with those of _ROW_FIELDS."""
    sums: Mapping[str, float] = field(default_factory=dict)
    """Numbers that are added up over a shard."""


@dataclass(frozen=True)
class LeftOut:
    """A sample that is not written."""

    key: str
    reason: str
    """One of a few, to be counted."""
    fault: str | None = None
    """For a sample that is broken rather than unwanted: what is wrong."""


def tar_path(folder: Path, shard: int) -> Path:
    """Where a shard of a set lies."""
    return folder / f"{shard:05d}.tar"


def stats_path(folder: Path, shard: int) -> Path:
    """Where its account lies."""
    return folder / f"{shard:05d}_stats.json"


def read_stats(folder: Path, shard: int) -> dict[str, Any] | None:
    """The account of a shard that is done, otherwise None. A shard of which nothing was kept has no tar."""
    try:
        stats: dict[str, Any] = json.loads(stats_path(folder, shard).read_text())
    except (OSError, ValueError):
        return None
    if stats["successes"] == 0:
        return stats
    path = tar_path(folder, shard)
    return stats if path.is_file() and path.stat().st_size == stats["bytes"] else None


def missing(folder: Path, shards: int, part: int = 0, parts: int = 1) -> list[int]:
    """The shards that are not done, of those that belong to one of several parts."""
    return [shard for shard in range(part, shards, parts) if read_stats(folder, shard) is None]


def make_shard(folder: Path, shard: int, samples: Iterable[Prepared | LeftOut]) -> None:
    """Makes one shard.

    Args:
        folder: of the set.
        shard: its number.
        samples: in the order of writing; a function of the shard's number, so that a second run gives the same bytes.

    Raises:
        OSError: where the disk does not take it.
    """
    counts, sums = Counter[str](), Counter[str]()
    faults: list[list[str]] = []
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=folder, prefix=_UNFINISHED) as temporary:
        with ShardWriter(temporary, samples_per_shard=1 << 62) as writer:
            for sample in samples:
                if isinstance(sample, LeftOut):
                    counts[sample.reason] += 1
                    faults += [] if sample.fault is None else [[sample.key, sample.fault]]
                    continue
                writer.write(_members(sample), key=sample.key)
                sums.update(sample.sums)
                rows.append(_row(sample))
        stats = {"count": len(rows) + counts.total(), "successes": len(rows), "status_dict": dict(counts)}
        stats |= {"faults": faults, "sums": dict(sums)}
        if rows:
            stats |= {"bytes": writer.paths[0].stat().st_size, "sha256": file_hash(writer.paths[0])}
            table = Path(temporary) / "rows.parquet"
            pq.write_table(pa.Table.from_pylist(rows), table)
            os.replace(writer.paths[0], tar_path(folder, shard))
            os.replace(table, tar_path(folder, shard).with_suffix(".parquet"))
    write_json(stats_path(folder, shard), stats)


def write_sums(folder: Path, stats: Iterable[dict[str, Any]]) -> None:
    """Writes the checksums of a whole set, in the format of `sha256sum --check`."""
    lines = [f"{one['sha256']}  {shard:05d}.tar\n" for shard, one in enumerate(stats) if one["successes"]]
    write_text(folder / SUMS_FILE, "".join(lines))


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def tidy(folder: Path) -> None:
    """Removes what killed runs left; for a set that is complete."""
    for path in folder.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(path, ignore_errors=True)


def _members(sample: Prepared) -> dict[str, Member]:
    content = {name: one.encode() if isinstance(one, str) else one for name, one in sample.members.items()}
    checksums = {name: zlib.crc32(one) for name, one in content.items()}
    return {**content, JSON_MEMBER: {**sample.fields, CHECKSUMS_FIELD: checksums}}


def _row(sample: Prepared) -> dict[str, Any]:
    caption = sample.members.get("txt", "")
    return {"key": sample.key, "status": "success", "caption": caption} | {
        name: int(sample.fields[name]) for name in _ROW_FIELDS
    }
