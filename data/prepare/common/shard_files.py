"""A set that is written shard by shard, each atomically and each a function of its number alone: any number of processes and
machines can share the work (`claims`), and an interrupted run loses only the shards in progress.

Beside `00000.tar` are two sidecars with the names that img2dataset gives them: `00000.parquet`, a row per sample, and
`00000_stats.json`, counts of the samples that were read, kept and left out, with size and SHA-256 of the tar. The latter is
written last: a shard is complete where it exists and matches the tar.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data.prepare.common.checksums import CHECKSUMS_FIELD, SUMS_FILE, sums_content
from data.prepare.common.claims import Claim, Claims, shard_name
from data.prepare.common.options import SetPart
from data.prepare.common.set_folder import LocalFolder, SetFolder
from data.prepare.common.settings_file import json_content
from data.shards.decoders import JSON_MEMBER
from data.shards.index import ShardSet
from data.shards.writer import Member, ShardWriter
from sdxs_lightning.core.errors import UserError

SUMMARY_FILE = "summary.json"
UNREADABLE = "unreadable"
"""Reason of samples that are broken."""
_ROW_FIELDS = ("width", "height", "original_width", "original_height", "crop_top", "crop_left")
_FAULTS_SHOWN = 20
_THREADS = 16


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


def tar_name(shard: int) -> str:
    """File name of a shard."""
    return f"{shard_name(shard)}.tar"


def read_stats(folder: SetFolder, shard: int) -> dict[str, Any] | None:
    """The statistics of a complete shard, otherwise None. A shard of which nothing was kept has no tar."""
    stats = _stats_of(folder, shard)
    if stats is None or stats["successes"] == 0:
        return stats
    return stats if folder.size(tar_name(shard)) == stats["bytes"] else None


def read_all_stats(folder: SetFolder, shards: Iterable[int]) -> dict[int, dict[str, Any]]:
    """The statistics of those of some shards that are complete; lists the folder once."""
    sizes = folder.names()
    begun = [shard for shard in shards if stats_name(shard) in sizes]
    with ThreadPoolExecutor(_THREADS) as threads:  # small files with high latency
        found = dict(zip(begun, threads.map(lambda shard: _stats_of(folder, shard), begun), strict=True))
    return {
        shard: stats
        for shard, stats in found.items()
        if stats is not None and (stats["successes"] == 0 or sizes.get(tar_name(shard)) == stats["bytes"])
    }


def missing_shards(folder: SetFolder, shards: int, part: SetPart = SetPart(0, 1)) -> list[int]:
    """The shards of one part of a set that are not complete."""
    wanted = range(part.number, shards, part.parts)
    complete = read_all_stats(folder, wanted)
    return [shard for shard in wanted if shard not in complete]


def make_shard(
    folder: SetFolder,
    shard: int,
    samples: Iterable[PreparedSample | LeftOutSample],
    claim: Claim | None = None,
) -> None:
    """Writes one shard and its sidecars.

    Args:
        folder: of the set.
        shard: its number.
        samples: in the order of writing; a function of the shard's number, so that a second run gives the same bytes.
        claim: of the shard; if another process has superseded it by the end, nothing is written.

    Raises:
        OSError: if it cannot be written.
    """
    counts, sums = Counter[str](), Counter[str]()
    faults: list[list[str]] = []
    rows: list[dict[str, Any]] = []
    with unless_superseded(claim), folder.temporary_folder() as temporary:
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
            table = temporary / "rows.parquet"
            pq.write_table(pa.Table.from_pylist(rows), table)
            stats |= size_and_hash(writer.paths[0])
        if claim is not None and not claim.held():
            return
        if rows:
            folder.publish(writer.paths[0], tar_name(shard))
            folder.publish(table, f"{shard_name(shard)}.parquet")
        folder.write(stats_name(shard), json_content(stats))


@contextmanager
def unless_superseded(claim: Claim | None) -> Iterator[None]:
    """Ignores failures of a process that was taken for dead, whose temporary folder another one may have removed."""
    try:
        yield
    except OSError:
        if claim is None or claim.held():
            raise


def size_and_hash(tar: Path) -> dict[str, Any]:
    """The fields `bytes` and `sha256` of a shard's statistics."""
    with tar.open("rb") as stream:
        return {"bytes": tar.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def summarise(
    folder: SetFolder, shards: int, settings: Mapping[str, Any], samples_read: int, seconds: float
) -> dict[str, Any]:
    """Sums the shards' statistics; writes SHA256SUMS if the set is complete.

    Args:
        folder: of the set.
        shards: number of shards of the complete set.
        settings: for the summary.
        samples_read: by this command.
        seconds: of this command.

    Returns:
        The content of summary.json, which the caller writes; {} if shards are still missing.

    Raises:
        UserError: if no sample was kept, or a shard has changed since it was written.
    """
    stats = read_all_stats(folder, range(shards))
    if len(stats) < shards:
        return {}
    kept = sum(one["successes"] for one in stats.values())
    reasons, sums = Counter[str](), Counter[str]()
    for one in stats.values():
        reasons.update(one["status_dict"])
        sums.update(one["sums"])
    faults = [fault for one in stats.values() for fault in one["faults"]]
    if not kept:
        why = faults[0][1] if faults else _counted(reasons)
        raise UserError(f"no sample was kept of {reasons.total()}: {why}.")
    tars = [tar_name(shard) for shard, one in stats.items() if one["successes"]]
    if isinstance(folder, LocalFolder):
        _check_samples(folder, kept)
    folder.remove_abandoned()
    sums_of_files = {tar_name(shard): one["sha256"] for shard, one in stats.items() if one["successes"]}
    folder.write(SUMS_FILE, sums_content(sums_of_files).encode())
    return {
        "samples": kept,
        "shards": len(tars),
        "bytes": sum(one.get("bytes", 0) for one in stats.values()),
        "left_out": dict(sorted(reasons.items())),
        "faults": faults[:_FAULTS_SHOWN],
        "sums": dict(sums),
        "read": samples_read,
        "seconds": seconds,
        "settings": dict(settings),
    }


def describe(folder: SetFolder, shards: int, summary: Mapping[str, Any]) -> str:
    """A summary, or what is missing, in a sentence.

    Args:
        folder: of the set.
        shards: number of shards of the complete set.
        summary: of `summarise`.
    """
    if not summary:
        return (
            f"{len(missing_shards(folder, shards))} of {shards} shards in {folder} wait for the other parts"
        )
    left_out = f"; left out: {_counted(summary['left_out'])}" if summary["left_out"] else ""
    return f"{folder} holds {summary['samples']} samples in {summary['shards']} shards{left_out}"


def summarise_once(
    folder: SetFolder, before: bytes | None, summary: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """Writes summary.json; of several commands that finish a set together, one does.

    Args:
        folder: of the set.
        before: summary.json when this command began.
        summary: makes its content; {} if shards are still missing.

    Returns:
        Its content.
    """
    claims = Claims(folder)
    with claims.wait_for("summary"):
        there = folder.read(SUMMARY_FILE)
        if there is not None and there != before:
            made: dict[str, Any] = json.loads(there)
        else:
            made = summary()
            if made:
                folder.write(SUMMARY_FILE, json_content(made))
    claims.tidy()
    return made


def _check_samples(folder: LocalFolder, kept: int) -> None:
    """Indexes the shards, and compares their samples with the statistics; at a URL that would read them all again."""
    tars = sorted(folder.path.glob("[0-9]*.tar"))
    indexed = sum(ShardSet.open([str(path) for path in tars]).sizes)
    if indexed != kept:
        raise UserError(
            f"the shards in '{folder}' hold {indexed} samples and their _stats.json files count {kept}; remove the shard that "
            "was changed (`python -m data.prepare verify` finds it) and run the same command again."
        )


def stats_name(shard: int) -> str:
    """File name of a shard's statistics."""
    return f"{shard_name(shard)}_stats.json"


def _stats_of(folder: SetFolder, shard: int) -> dict[str, Any] | None:
    """The statistics of a shard as they were written, which does not say that its tar is there."""
    content = folder.read(stats_name(shard))
    try:
        stats: dict[str, Any] | None = None if content is None else json.loads(content)
    except ValueError:
        return None
    return stats


def _members(sample: PreparedSample) -> dict[str, Member]:
    content = {name: one.encode() if isinstance(one, str) else one for name, one in sample.members.items()}
    checksums = {name: zlib.crc32(one) for name, one in content.items()}
    return {**content, JSON_MEMBER: {**sample.fields, CHECKSUMS_FIELD: checksums}}


def _row(sample: PreparedSample) -> dict[str, Any]:
    caption = sample.members.get("txt", "")
    return {"key": sample.key, "status": "success", "caption": caption} | {
        name: int(sample.fields[name]) for name in _ROW_FIELDS
    }


def _counted(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
