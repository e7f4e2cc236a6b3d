"""`python -m data.prepare verify`: whether every byte of a set of shards is as a training needs it."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from data.prepare.common.option_types import at_least
from data.prepare.common.processes import OnProgress, available_cores, run_all
from data.prepare.common.progress import ProgressBar
from data.prepare.common.remote import Reach, add_cache
from data.prepare.common.settings_file import write_text
from data.prepare.common.shard_files import SUMS_FILE
from data.prepare.common.subcommand import Subcommand
from data.prepare.verify.shard_check import Report, check_shard, recorded_sums
from data.shards.dataset import EmptyCaptions
from data.shards.locations import file_name, find_locations, is_remote
from sdxs_lightning.core.errors import UserError

EXAMPLES = """examples:
  python -m data.prepare verify datasets/photos
  python -m data.prepare verify 'laion/{00000..00999}.tar' --processes 16 --out faults.jsonl
  python -m data.prepare verify datasets/photos --record

Every member is read and decoded as a training would, and compared with the checksums that `images` and `latents` write: of
each file (SHA256SUMS) and of each member (crc32 in the json). Faults are told on stdout, one a line; the exit code is 0 where
there is none. The index of each shard is written beside it, with a checksum of every member: from then on a training starts at
once and sees every byte that changed. --record also writes SHA256SUMS for shards that came without.
"""


@dataclass(frozen=True)
class VerifyJob:
    """What every process has to know."""

    locations: tuple[str, ...]
    reach: Reach
    empty_captions: EmptyCaptions
    processes: int

    def work(self, process: int, parts: Sequence[int], told: OnProgress) -> None:
        """Looks at shards; see `processes.Job`."""
        for part in parts:
            told(check_shard(self.locations[part], self.reach, self.empty_captions))


def run(options: argparse.Namespace) -> str:
    """Looks at all shards.

    Raises:
        UserError: where there are faults, or no shards.
        Interrupted: after Ctrl-C.
    """
    try:
        locations = tuple(find_locations(options.shards))
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from error
    processes = options.processes or available_cores()
    job = VerifyJob(locations, Reach.of(options), options.empty_captions, processes)
    reports: list[Report] = []
    progress = ProgressBar(len(locations), "shards")

    def told(report: Report) -> None:
        reports.append(report)
        sys.stdout.writelines(f"{fault}\n" for fault in report.faults)
        sys.stdout.flush()
        progress(1)

    started = time.monotonic()
    run_all(job, range(len(locations)), told)
    seconds = time.monotonic() - started
    reports.sort(key=lambda report: locations.index(report.location))
    faults = [fault for report in reports for fault in report.faults]
    if options.out is not None:
        write_text(options.out, "".join(f"{json.dumps(asdict(fault))}\n" for fault in faults))
    samples = sum(report.samples for report in reports)
    broken = sum(bool(report.faults) for report in reports)
    if faults:
        raise UserError(
            f"{len(faults)} faults in {broken} of {len(locations)} shards with {samples} samples."
        )
    if options.record:
        _record(reports)
    compared = sum(report.recorded for report in reports)
    return (
        f"{samples} samples in {len(locations)} shards are whole, read in {seconds:.1f} s; "
        f"{compared} shards compared with their SHA-256"
    )


def _record(reports: Sequence[Report]) -> None:
    """Writes SHA256SUMS into the folders of the shards; what is recorded there already stays."""
    folders: defaultdict[Path, dict[str, str]] = defaultdict(dict)
    for report in reports:
        if not is_remote(report.location):
            folders[Path(report.location).parent][file_name(report.location)] = report.sha256
    for folder, sums in folders.items():
        every = sorted((recorded_sums(folder) | sums).items())
        write_text(folder / SUMS_FILE, "".join(f"{checksum}  {name}\n" for name, checksum in every))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds them to the parser of the command."""
    add = parser.add_argument
    add("shards", nargs="+", metavar="SHARDS", help="folders, globs or brace patterns of tars")
    add("--processes", type=at_least(1), help="default: one a core")
    add("--index-folder", help="where indexes are kept if not beside the shards, as data.index_folder")
    add_cache(add)
    add(
        "--empty-captions",
        choices=["refuse", "keep"],
        default="refuse",
        help="whether a sample without words is a fault, as data.empty_captions (default: %(default)s)",
    )
    add(
        "--out",
        type=Path,
        help="also write the faults here, as JSON lines (shard, key, reason), as data.faults.quarantine",
    )
    add("--record", action="store_true", help="write SHA256SUMS where no shard has a fault")


VERIFY = Subcommand(
    "verify",
    "Read, check and decode every byte of shards, and write their index.",
    EXAMPLES,
    add_arguments,
    run,
)
