"""A set that is written shard by shard, each atomically and each a function of its number alone: any number of processes can
share the work, and an interrupted run loses only the shards in progress.

Beside `00000.tar` are two sidecars with the names that img2dataset gives them: `00000.parquet`, a row per sample, and
`00000_stats.json`, counts of the samples that were read, kept and left out, with size and SHA-256 of the tar. The latter is
written last: a shard is complete where it exists and matches the tar.
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

from data.prepare.common.checksums import CHECKSUMS_FIELD, write_sums
from data.prepare.common.options import SetPart
from data.prepare.common.settings_file import write_json
from data.shards.decoders import JSON_MEMBER
from data.shards.index import ShardSet
from data.shards.writer import Member, ShardWriter
from sdxs_lightning.core.errors import UserError

SUMMARY_FILE = "summary.json"
UNREADABLE = "unreadable"
"""Reason of samples that are broken."""
_UNFINISHED = ".making-"
_ROW_FIELDS = ("width", "height", "original_width", "original_height", "crop_top", "crop_left")
_FAULTS_SHOWN = 20


@dataclass(frozen=True)
class PreparedSample:
    """A sample to write."""

    key: str
    members: Mapping[str, bytes | str]
    """All but json."""
    fields: Mapping[str, Any]
    """Fields of the json member; with those of _ROW_FIELDS."""
    sums: Mapping[str, float] = field(default_factory=dict)
    """Numbers that are summed over a shard."""


@dataclass(frozen=True)
class LeftOutSample:
    """A sample that is not written."""

    key: str
    reason: str
    """One of a few, counted in the statistics."""
    fault: str | None = None
    """What is wrong with a sample that is broken rather than filtered out."""


def tar_path(folder: Path, shard: int) -> Path:
    """Path of a shard of a set."""
    return folder / f"{shard:05d}.tar"


def read_stats(folder: Path, shard: int) -> dict[str, Any] | None:
    """The statistics of a complete shard, otherwise None. A shard of which nothing was kept has no tar."""
    try:
        stats: dict[str, Any] = json.loads(_stats_path(folder, shard).read_text())
    except (OSError, ValueError):
        return None
    if stats["successes"] == 0:
        return stats
    path = tar_path(folder, shard)
    return stats if path.is_file() and path.stat().st_size == stats["bytes"] else None


def missing_shards(folder: Path, shards: int, part: SetPart = SetPart(0, 1)) -> list[int]:
    """The shards of one part of a set that are not complete."""
    return [shard for shard in range(part.number, shards, part.parts) if read_stats(folder, shard) is None]


def make_shard(folder: Path, shard: int, samples: Iterable[PreparedSample | LeftOutSample]) -> None:
    """Writes one shard and its sidecars.

    Args:
        folder: of the set.
        shard: its number.
        samples: in the order of writing; a function of the shard's number, so that a second run gives the same bytes.

    Raises:
        OSError: if it cannot be written.
    """
    counts, sums = Counter[str](), Counter[str]()
    faults: list[list[str]] = []
    rows: list[dict[str, Any]] = []
    with unfinished_folder(folder) as temporary:
        with ShardWriter(temporary, samples_per_shard=1 << 62) as writer:
            for sample in samples:
                if isinstance(sample, LeftOutSample):
                    counts[sample.reason] += 1
                    faults += [] if sample.fault is None else [[sample.key, sample.fault]]
                    continue
                writer.write(_members(sample), key=sample.key)
                sums.update(sample.sums)
                rows.append(_row(sample))
        stats = {"count": len(rows) + counts.total(), "successes": len(rows), "status_dict": dict(counts)}
        stats |= {"faults": faults, "sums": dict(sums)}
        if rows:
            stats |= {"bytes": writer.paths[0].stat().st_size, "sha256": _file_hash(writer.paths[0])}
            table = Path(temporary) / "rows.parquet"
            pq.write_table(pa.Table.from_pylist(rows), table)
            os.replace(writer.paths[0], tar_path(folder, shard))
            os.replace(table, tar_path(folder, shard).with_suffix(".parquet"))
    write_json(_stats_path(folder, shard), stats)


def summarise(
    folder: Path, shards: int, settings: Mapping[str, Any], samples_read: int, seconds: float
) -> tuple[str, dict[str, Any]]:
    """Sums the shards' statistics; writes summary.json and SHA256SUMS if the set is complete.

    Args:
        folder: of the set.
        shards: number of shards of the complete set.
        settings: for the summary.
        samples_read: by this command.
        seconds: of this command.

    Returns:
        A message for the user, and the summary; {} if shards are still missing.

    Raises:
        UserError: if no sample was kept, or a shard has changed since it was written.
    """
    waiting = len(missing_shards(folder, shards))
    done = f"{samples_read} samples read in {seconds:.1f} s"
    if waiting:
        return f"{done}; {waiting} of {shards} shards in {folder} wait for the other parts", {}
    stats = [one for shard in range(shards) if (one := read_stats(folder, shard)) is not None]
    kept = sum(one["successes"] for one in stats)
    reasons, sums = Counter[str](), Counter[str]()
    for one in stats:
        reasons.update(one["status_dict"])
        sums.update(one["sums"])
    faults = [fault for one in stats for fault in one["faults"]]
    if not kept:
        why = faults[0][1] if faults else _counted(reasons)
        raise UserError(f"no sample was kept of {reasons.total()}: {why}.")
    tars = sorted(folder.glob("[0-9]*.tar"))
    indexed = sum(ShardSet.open([str(path) for path in tars]).sizes)
    if indexed != kept:
        raise UserError(
            f"the shards in '{folder}' hold {indexed} samples and their _stats.json files count {kept}; remove the shard that "
            "was changed (`python -m data.prepare verify` finds it) and run the same command again."
        )
    remove_unfinished(folder)
    write_sums(
        folder, {tar_path(folder, i).name: one["sha256"] for i, one in enumerate(stats) if one["successes"]}
    )
    summary: dict[str, Any] = {
        "samples": kept,
        "shards": len(tars),
        "bytes": sum(one.get("bytes", 0) for one in stats),
        "left_out": dict(sorted(reasons.items())),
        "faults": faults[:_FAULTS_SHOWN],
        "sums": dict(sums),
        "read": samples_read,
        "seconds": seconds,
        "settings": dict(settings),
    }
    write_json(folder / SUMMARY_FILE, summary)
    left_out = f"; left out: {_counted(reasons)}" if reasons else ""
    return f"{done}; {folder} holds {kept} samples in {len(tars)} shards{left_out}", summary


def remove_unfinished(folder: Path) -> None:
    """Removes the temporary folders of killed runs; for a set that is complete."""
    for path in folder.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(path, ignore_errors=True)


def unfinished_folder(folder: Path) -> tempfile.TemporaryDirectory[str]:
    """A temporary folder for a shard in progress."""
    return tempfile.TemporaryDirectory(dir=folder, prefix=_UNFINISHED)


def _stats_path(folder: Path, shard: int) -> Path:
    return folder / f"{shard:05d}_stats.json"


def _file_hash(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _members(sample: PreparedSample) -> dict[str, Member]:
    content = {name: one.encode() if isinstance(one, str) else one for name, one in sample.members.items()}
    checksums = {name: zlib.crc32(one) for name, one in content.items()}
    return {**content, JSON_MEMBER: {**sample.fields, CHECKSUMS_FIELD: checksums}}


def _row(sample: PreparedSample) -> dict[str, Any]:
    caption = sample.members.get("txt", "")
    return {"key": sample.key, "status": "success", "caption": caption} | {
        name: int(sample.fields[name]) for name in _ROW_FIELDS
    }


def _counted(reasons: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
