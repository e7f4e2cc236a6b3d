"""Checks every byte of a shard: headers, checksums, and every member decoded as in a training."""

from __future__ import annotations

import contextlib
import hashlib
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from data.prepare.common.checksums import CHECKSUMS_FIELD, recorded_sums
from data.prepare.common.options import RemoteOptions
from data.prepare.common.raw_shards import RawSample, RawShard, shard_store
from data.prepare.verify.options import VerifyOptions
from data.shards.checks import SampleCheck, Shape
from data.shards.decoders import (
    CAPTION_MEMBERS,
    CONTROL_IMAGE_MEMBERS,
    IMAGE_MEMBERS,
    JSON_MEMBER,
    LATENT_MEMBER,
    BadSampleError,
    decode_json,
)
from data.shards.index import ShardIndex, stated_samples
from data.shards.locations import file_name, is_remote
from data.shards.scan import scan_members
from data.shards.sidecar import load_sidecar, save_sidecar, sidecar_path
from data.shards.store import ShardStore
from sdxs_lightning.core.errors import one_line

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
class ShardFault:
    """Something that is wrong with a shard."""

    shard: str
    key: str
    """Key of the sample; "" for the complete shard."""
    reason: str

    def __str__(self) -> str:
        """One line."""
        where = f"{self.shard}, key {self.key!r}" if self.key else self.shard
        return one_line(f"{where}: {self.reason}")


@dataclass
class ShardReport:
    """The result of checking one shard."""

    location: str
    samples: int = 0
    sha256: str = ""
    recorded: bool = False
    """Whether there was a checksum to compare with."""
    indexed: bool = False
    """Whether its index was written."""
    faults: list[ShardFault] = field(default_factory=list)
    latent_shapes: Mapping[Shape, Sequence[str]] = field(default_factory=dict)
    """The keys of the samples of each shape of latents."""

    def add(self, key: str, reason: str) -> None:
        """Adds a fault; removes the shard and key from the beginning of the reason, since they are printed before it."""
        for prefix in (f"{self.location}, key {key!r}", self.location):
            reason = reason.removeprefix(prefix).lstrip(": ")
        self.faults.append(ShardFault(self.location, key, reason))


def check_shard(location: str, options: VerifyOptions) -> ShardReport:
    """Reads a complete shard, and stores its index with the checksum of every member.

    Args:
        location: path or URL of the tar.
        options: what is checked, and access to the shard.
    """
    report, store = ShardReport(location), shard_store(options)
    contents = None if options.contents is None else [one for one in options.contents if one != "captions"]
    check = SampleCheck(contents, options.empty_captions)
    try:
        stamp = store.stamp(location)
        index = replace(scan_members(location, store.members(location, stamp)), stamp=stamp)
        report.samples = len(index)
        for fault in index.faults:
            report.add(fault.key, fault.reason)
        _compare_file(report, store)
        checksums = _read(report, index, store, check)
        report.latent_shapes = check.latent_shapes
        for reason in check.shard():
            report.add("", reason)
        _save_index(report, replace(index, checksums=checksums), options, store)
    except (OSError, ValueError) as error:
        report.add("", str(error))
    if not report.samples and not report.faults:
        report.add("", "it holds no sample")
    return report


def _compare_file(report: ShardReport, store: ShardStore) -> None:
    """Compares a file with its recorded SHA-256 and number of samples."""
    digest, start = hashlib.sha256(), 0
    file = store.open(report.location)
    try:
        while content := bytes(file.read(start, _READ_BYTES)):
            digest.update(content)
            start += len(content)
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
    report: ShardReport, index: ShardIndex, store: ShardStore, check: SampleCheck
) -> np.ndarray[Any, np.dtype[np.uint32]]:
    """Decodes every sample; returns the CRC-32 of every member, in the shape of the index's offsets."""
    checksums = np.zeros(index.offsets.shape, dtype=np.uint32)
    broken, required = {fault.key for fault in index.faults}, _usual_kinds(index)
    with RawShard(index, store) as shard:
        for row in range(len(index)):
            sample = shard.sample(row)
            if sample.key in broken:
                continue  # reported already, and without members in the index
            for name, content in sample.members.items():
                checksums[row, index.extensions.index(name)] = zlib.crc32(content)
            for reason in _faults(sample, required, check):
                report.add(sample.key, reason)
    return checksums


def _save_index(report: ShardReport, index: ShardIndex, remote: RemoteOptions, store: ShardStore) -> None:
    """Stores the index for trainings, unless later checks would then compare with bytes that changed."""
    sidecar, stamp = sidecar_path(index.location, remote.indexes), store.stamp(index.location)
    kept = load_sidecar(sidecar, index.location, stamp)
    if kept is not None and kept.fingerprint != index.fingerprint:
        report.add("", "its stored index was of other contents, and has been written again")
        kept = None
    if kept is not None and kept.checksums is not None:
        for row, column in np.argwhere(kept.checksums != index.checksums).tolist():
            report.add(
                index.key(row), f"{index.extensions[column]}: {_CHANGED} since the shard was last verified"
            )
        return
    changed = any(_CHANGED in fault.reason for fault in report.faults)
    save_sidecar(sidecar, replace(index, checksums=None) if changed else index, stamp)
    report.indexed = True


def _usual_kinds(index: ShardIndex) -> set[str]:
    """Kinds of members that more than half of the samples have; a sample without one is at fault."""
    counts = Counter[str]()
    for kind, names in _KINDS.items():
        columns = [column for name in names if (column := index.column(name)) is not None]
        counts[kind] = int((index.offsets[:, columns] >= 0).any(axis=1).sum()) if columns else 0
    return {kind for kind, count in counts.items() if 2 * count > len(index)}


def _faults(sample: RawSample, required: set[str], check: SampleCheck) -> Iterator[str]:
    for kind in sorted(required):
        if not any(name in sample.members for name in _KINDS[kind]):
            yield f"there is no {kind} ({', '.join(_KINDS[kind])}), which most samples of this shard have"
    yield from check.sample(sample.key, sample.members)
    checksums: Any = {}
    with contextlib.suppress(BadSampleError):  # reported by the check
        checksums = decode_json(sample.members.get(JSON_MEMBER, b"{}"), "").get(CHECKSUMS_FIELD)
    for name, checksum in checksums.items() if isinstance(checksums, dict) else ():
        if name not in sample.members:
            yield f"{name} is missing, and its json has a checksum of it"
        elif zlib.crc32(sample.members[name]) != checksum:
            yield f"{name}: {_CHANGED} since it was written (CRC-32 in the json)"
