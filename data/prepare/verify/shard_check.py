"""Looking at every byte of a shard: headers, checksums, and every member decoded as a training would."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from data.prepare.common.raw_shards import RawSample, RawShard
from data.prepare.common.remote import Reach
from data.prepare.common.shard_files import CHECKSUMS_FIELD, SUMS_FILE
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
from data.shards.img2dataset import stated_samples
from data.shards.index import ShardIndex
from data.shards.locations import file_name, is_remote
from data.shards.scan import scan_members
from data.shards.sidecar import load_sidecar, save_sidecar, sidecar_path
from data.shards.store import ShardStore

_KINDS = {
    "image": IMAGE_MEMBERS,
    "latents": (LATENT_MEMBER,),
    "caption": CAPTION_MEMBERS,
    "condition image": CONTROL_IMAGE_MEMBERS,
    "json": (JSON_MEMBER,),
}
_CHANGED = "bytes have changed"
_READ_BYTES = 1 << 23


@dataclass(frozen=True)
class Fault:
    """Something that is wrong with a shard."""

    shard: str
    key: str
    """ "" for the shard as a whole."""
    reason: str

    def __str__(self) -> str:
        """One line."""
        where = f"{self.shard}, key '{self.key}'" if self.key else self.shard
        return " ".join(f"{where}: {self.reason}".split())


@dataclass
class Report:
    """What was found in one shard."""

    location: str
    samples: int = 0
    sha256: str = ""
    recorded: bool = False
    """Whether there was a checksum to compare with."""
    faults: list[Fault] = field(default_factory=list)

    def add(self, key: str, reason: str) -> None:
        """One more fault; what the line says already is cut off its reason."""
        for said in (f"{self.location}, key '{key}'", self.location):
            reason = reason.removeprefix(said).lstrip(": ")
        self.faults.append(Fault(self.location, key, reason))


def check_shard(location: str, reach: Reach, empty_captions: EmptyCaptions) -> Report:
    """Reads a whole shard, and keeps its index with the checksum of every member.

    Args:
        location: path or URL of the tar.
        reach: how it is reached, and where its index is kept.
        empty_captions: whether a sample without words is a fault ("refuse").
    """
    report, store = Report(location), reach.store()
    try:
        index = scan_members(location, store.members(location))
        report.samples = len(index)
        for fault in index.faults:
            report.add(fault.key, fault.reason)
        _compare_file(report, store)
        checksums = _read(report, index, store, empty_captions)
        _keep(report, replace(index, checksums=checksums), reach, store)
    except (OSError, ValueError) as error:
        report.add("", str(error))
    if not report.samples and not report.faults:
        report.add("", "it holds no sample")
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


def _compare_file(report: Report, store: ShardStore) -> None:
    """Compares a whole shard with what was recorded of it."""
    digest, start = hashlib.sha256(), 0
    file = store.open(report.location)
    try:
        while part := bytes(file.read(start, _READ_BYTES)):
            digest.update(part)
            start += len(part)
    finally:
        file.close()
    report.sha256 = digest.hexdigest()
    if is_remote(report.location):
        return
    expected = recorded_sums(Path(report.location).parent).get(file_name(report.location))
    report.recorded = expected is not None
    if expected not in (None, report.sha256):
        report.add("", f"{_CHANGED}: its SHA-256 is {report.sha256}, and {expected} was recorded")
    stated = stated_samples(report.location)
    if stated is not None and stated != report.samples:
        report.add("", f"it holds {report.samples} samples, and its _stats.json counts {stated}")


def _read(
    report: Report, index: ShardIndex, store: ShardStore, empty_captions: EmptyCaptions
) -> np.ndarray[Any, np.dtype[np.uint32]]:
    """Decodes every sample; returns the CRC-32 of every member, as the index's offsets."""
    checksums = np.zeros(index.offsets.shape, dtype=np.uint32)
    broken, wanted = {fault.key for fault in index.faults}, _usual_kinds(index)
    with RawShard(index, store) as shard:
        for row in range(len(index)):
            sample = shard.sample(row)
            if sample.key in broken:
                continue  # told of already, and without members in the index
            for name, content in sample.members.items():
                checksums[row, index.extensions.index(name)] = zlib.crc32(content)
            for reason in _faults(sample, wanted, empty_captions):
                report.add(sample.key, reason)
    return checksums


def _keep(report: Report, index: ShardIndex, reach: Reach, store: ShardStore) -> None:
    """Keeps the index, for trainings, unless that would make changed bytes the measure of later checks."""
    sidecar, stamp = sidecar_path(index.location, reach.indexes), store.stamp(index.location)
    kept = load_sidecar(sidecar, index.location, stamp)
    if kept is not None and kept.fingerprint != index.fingerprint:
        report.add("", "its kept index was of other contents, and has been made again")
        kept = None
    if kept is not None and kept.checksums is not None:
        for row, column in np.argwhere(kept.checksums != index.checksums).tolist():
            report.add(
                index.key(row), f"{index.extensions[column]}: {_CHANGED} since the shard was last verified"
            )
        return
    changed = any(_CHANGED in fault.reason for fault in report.faults)
    save_sidecar(sidecar, replace(index, checksums=None) if changed else index, stamp)


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
            decoded = decode(name, content, name)
        except BadSampleError as error:
            yield str(error)
            continue
        if name == JSON_MEMBER:
            checksums = decoded.get(CHECKSUMS_FIELD)
        if name in CAPTION_MEMBERS and not decoded and empty_captions == "refuse":
            yield "the caption is empty"
    for name, checksum in checksums.items() if isinstance(checksums, dict) else ():
        if name not in sample.members:
            yield f"{name} is missing, and its json has a checksum of it"
        elif zlib.crc32(sample.members[name]) != checksum:
            yield f"{name}: {_CHANGED} since it was written (CRC-32 in the json)"
