"""`python -m data.prepare verify`: whether every byte of a set of shards is as a training needs it."""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from data.prepare.common.checksums import SUMS_FILE, recorded_sums, write_sums
from data.prepare.common.processes import OnProgress, available_cores, run_all
from data.prepare.common.progress import CommandProgress
from data.prepare.common.settings_file import write_text
from data.prepare.verify.options import VerifyOptions
from data.prepare.verify.shard_check import ShardReport, check_shard
from data.shards.checks import Shape, odd_latents
from data.shards.indexing.building import drop_packed
from data.shards.locations import file_name, find_locations, is_remote
from data.shards.sidecar import sidecar_path
from sdxs_lightning.core.errors import UserError


@dataclass(frozen=True)
class VerifyJob:
    """Checks shards; a `processes.Job`."""

    options: VerifyOptions
    locations: tuple[str, ...]
    processes: int

    def work(self, process: int, tasks: Sequence[int], on_progress: OnProgress) -> None:
        for task in tasks:
            on_progress(check_shard(self.locations[task], self.options))


def run(options: VerifyOptions) -> str:
    """Checks all shards.

    Raises:
        UserError: if there are faults, or no shards.
        Interrupted: after Ctrl-C.
    """
    options.check_locations(options.shards)
    try:
        locations = tuple(find_locations(options.shards))
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from error
    reports: list[ShardReport] = []
    progress = CommandProgress(len(locations), "shards")

    def on_progress(report: ShardReport) -> None:
        reports.append(report)
        sys.stdout.writelines(f"{fault}\n" for fault in report.faults)
        sys.stdout.flush()
        progress(1)

    started = time.monotonic()
    job = VerifyJob(options, locations, options.processes or available_cores())
    run_all(job, range(len(locations)), on_progress)
    seconds = time.monotonic() - started
    for folder in {sidecar_path(one.location, options.indexes).parent for one in reports if one.indexed}:
        drop_packed(folder)  # it lacks the checksums
    reports.sort(key=lambda report: locations.index(report.location))
    for report in _missing_shards(reports):
        reports.append(report)
        sys.stdout.writelines(f"{fault}\n" for fault in report.faults)
    if not options.buckets:
        by_location = {report.location: report for report in reports}
        for shapes in _latents_of_one_size(reports):
            for location, key, reason in odd_latents(shapes):
                by_location[location].add(key, reason)
                sys.stdout.write(f"{by_location[location].faults[-1]}\n")
    faults = [fault for report in reports for fault in report.faults]
    if options.out is not None:
        write_text(options.out, "".join(f"{json.dumps(asdict(fault))}\n" for fault in faults))
    samples = sum(report.samples for report in reports)
    if faults:
        broken = sum(bool(report.faults) for report in reports)
        raise UserError(
            f"{len(faults)} faults in {broken} of {len(locations)} shards with {samples} samples."
        )
    if options.record:
        _record(reports)
    compared = sum(report.recorded for report in reports)
    return (
        f"no fault in {samples} samples in {len(locations)} shards, read in {seconds:.1f} s; "
        f"{compared} shards compared with their SHA-256"
    )


def _missing_shards(reports: Sequence[ShardReport]) -> list[ShardReport]:
    """A fault for each shard that a folder records and does not hold."""
    found = []
    for folder in sorted({Path(one.location).parent for one in reports if not is_remote(one.location)}):
        for name in recorded_sums(folder):
            if name.endswith(".tar") and not (folder / name).exists():
                report = ShardReport(str(folder / name))
                report.add("", f"it is missing, and {SUMS_FILE} or its _stats.json lists it")
                found.append(report)
    return found


def _latents_of_one_size(
    reports: Sequence[ShardReport],
) -> list[list[tuple[str, Mapping[Shape, Sequence[str]]]]]:
    """Location and latents of the shards of each folder, except for sets that `data.prepare latents` made for buckets."""
    folders: defaultdict[str, list[tuple[str, Mapping[Shape, Sequence[str]]]]] = defaultdict(list)
    for report in reports:
        folders[report.location.rpartition("/")[0]].append((report.location, report.latent_shapes))
    return [shapes for folder, shapes in folders.items() if not _made_for_buckets(Path(folder))]


def _made_for_buckets(folder: Path) -> bool:
    try:
        return len(json.loads((folder / "latents.json").read_text())["sizes"]) > 1
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _record(reports: Sequence[ShardReport]) -> None:
    """Writes SHA256SUMS into the folders of the shards; earlier entries are kept."""
    folders: defaultdict[Path, dict[str, str]] = defaultdict(dict)
    for report in reports:
        if not is_remote(report.location):
            folders[Path(report.location).parent][file_name(report.location)] = report.sha256
    for folder, sums in folders.items():
        write_sums(folder, dict(sorted((recorded_sums(folder) | sums).items())))
