"""Looking at every byte of a shard: headers, checksums, and every member decoded as a training would."""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.prepare.raw_shards import RawSample, RawShard
from data.prepare.shard_files import CHECKSUMS_FIELD, SUMS_FILE, file_hash
from data.shards.dataset import EmptyCaptions
from data.shards.decoders import (
    CAPTION_MEMBERS,
    CONTROL_IMAGE_MEMBERS,
    IMAGE_MEMBERS,
    JSON_MEMBER,
    LATENT_MEMBER,
    READABLE,
    BadSampleError,
    decode,
)
from data.shards.index import ShardIndex, index_shard, scan_shard, sidecar_path

_KINDS = {
    "image": IMAGE_MEMBERS,
    "latents": (LATENT_MEMBER,),
    "caption": CAPTION_MEMBERS,
    "condition image": CONTROL_IMAGE_MEMBERS,
    "json": (JSON_MEMBER,),
}


@dataclass(frozen=True)
class Fault:
    """Something that is wrong with a shard."""

    shard: str
    key: str | None
    """None for the shard as a whole."""
    reason: str

    def __str__(self) -> str:
        """One line."""
        where = self.shard if self.key is None else f"{self.shard}, key '{self.key}'"
        return " ".join(f"{where}: {self.reason}".split())


@dataclass
class Report:
    """What was found in one shard."""

    path: Path
    samples: int = 0
    sha256: str | None = None
    recorded: bool = False
    """Whether there was a checksum to compare with."""
    faults: list[Fault] = field(default_factory=list)

    def add(self, key: str | None, reason: str) -> None:
        """One more fault."""
        self.faults.append(Fault(str(self.path), key, reason))


def check_shard(path: Path, index_folder: str | None, empty_captions: EmptyCaptions) -> Report:
    """Reads a whole shard, and writes its index beside it.

    Args:
        path: of the tar.
        index_folder: where its index is kept if not beside it.
        empty_captions: whether a sample without words is a fault ("refuse").
    """
    report = Report(path)
    try:
        report.sha256 = file_hash(path)
        index = _index(report, index_folder)
        report.samples = len(index)
        _compare(report)
        with RawShard(index) as shard:
            wanted = _usual_kinds(index)
            for row in range(len(index)):
                sample = shard.sample(row)
                for reason in _faults(sample, wanted, empty_captions):
                    report.add(sample.key, reason)
    except (OSError, ValueError) as error:
        report.add(None, _without(str(error), str(path)))
    if not report.samples and not report.faults:
        report.add(None, "it holds no sample")
    return report


def recorded_sums(folder: Path) -> dict[str, str]:
    """SHA-256 by file name, of SHA256SUMS and of the shards' accounts in a folder."""
    found: dict[str, str] = {}
    for stats in folder.glob("*_stats.json"):
        try:
            content: Any = json.loads(stats.read_text())
        except ValueError:
            continue  # img2dataset's own may be cut short; it has no checksum anyway
        if isinstance(content, dict) and isinstance(content.get("sha256"), str):
            found[f"{stats.name.removesuffix('_stats.json')}.tar"] = content["sha256"]
    sums = folder / SUMS_FILE
    for line in sums.read_text().splitlines() if sums.is_file() else ():
        checksum, _, name = line.partition("  ")
        found[name] = checksum
    return found


def _index(report: Report, index_folder: str | None) -> ShardIndex:
    """The index of the bytes of now; one that was kept is not believed."""
    index = scan_shard(report.path)
    if index_shard(report.path, index_folder).fingerprint != index.fingerprint:
        sidecar_path(report.path, index_folder).unlink()
        report.add(None, "its kept index was of other contents, and has been made again")
        index_shard(report.path, index_folder)
    return index


def _compare(report: Report) -> None:
    expected = recorded_sums(report.path.parent).get(report.path.name)
    report.recorded = expected is not None
    if expected not in (None, report.sha256):
        report.add(None, f"its SHA-256 is {report.sha256} and {expected} was recorded: bytes have changed")


def _usual_kinds(index: ShardIndex) -> set[str]:
    """Kinds of members that more than half of the samples have."""
    counts = Counter[str]()
    for kind, names in _KINDS.items():
        columns = [column for name in names if (column := index.column(name)) is not None]
        counts[kind] = int((index.offsets[:, columns] >= 0).any(axis=1).sum()) if columns else 0
    return {kind for kind, count in counts.items() if 2 * count > len(index)}


def _faults(sample: RawSample, wanted: set[str], empty_captions: EmptyCaptions) -> Iterator[str]:
    for kind in sorted(wanted):
        if not any(name in sample.members for name in _KINDS[kind]):
            yield f"there is no {kind} ({', '.join(_KINDS[kind])}), which most samples of this shard have"
    checksums: Any = {}
    for name, content in sample.members.items():
        if name not in READABLE:
            continue
        try:
            decoded = decode(name, content, sample.where)
        except BadSampleError as error:
            yield f"{name}: {_without(str(error), sample.where)}"
            continue
        if name == JSON_MEMBER:
            checksums = decoded.get(CHECKSUMS_FIELD)
        if name in CAPTION_MEMBERS and not decoded and empty_captions == "refuse":
            yield "the caption is empty"
    for name, checksum in checksums.items() if isinstance(checksums, dict) else ():
        if name not in sample.members:
            yield f"{name} is missing, and its json has a checksum of it"
        elif zlib.crc32(sample.members[name]) != checksum:
            yield f"{name}: its bytes have changed since it was written (CRC-32 in the json)"


def _without(message: str, where: str) -> str:
    """A message whose beginning the line says already."""
    return message.removeprefix(where).lstrip(": ")
