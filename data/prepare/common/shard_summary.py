"""The account of a whole set, once all its shards are done."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.prepare.common.settings_file import write_json
from data.prepare.common.shard_files import missing, read_stats, tidy, write_sums
from data.shards.index import ShardSet
from sdxs_lightning.core.errors import UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

SUMMARY_FILE = "summary.json"
_FAULTS_SHOWN = 20


def summarise(
    folder: Path, shards: int, settings: DataclassInstance, made: int, seconds: float
) -> tuple[str, dict[str, Any]]:
    """Adds up the shards' accounts; writes summary.json and SHA256SUMS where the set is complete.

    Args:
        folder: of the set.
        shards: number of shards of the whole set.
        settings: for the summary.
        made: samples that were read by this command.
        seconds: that it took.

    Returns:
        What to tell the user, and the summary; {} where shards are still missing.

    Raises:
        UserError: where no sample was kept, or a shard is not what was written.
    """
    waiting = len(missing(folder, shards))
    done = f"{made} samples read in {seconds:.1f} s"
    if waiting:
        return f"{done}; {waiting} of {shards} shards in {folder} wait for the other parts", {}
    accounts = [stats for shard in range(shards) if (stats := read_stats(folder, shard)) is not None]
    kept = sum(stats["successes"] for stats in accounts)
    reasons, sums = Counter[str](), Counter[str]()
    for stats in accounts:
        reasons.update(stats["status_dict"])
        sums.update(stats["sums"])
    faults = [fault for stats in accounts for fault in stats["faults"]]
    if not kept:
        told = faults[0][1] if faults else _counted(reasons)
        raise UserError(f"no sample was kept of {reasons.total()}: {told}.")
    tars = sorted(folder.glob("[0-9]*.tar"))
    indexed = sum(ShardSet.open([str(path) for path in tars]).sizes)
    if indexed != kept:
        raise UserError(
            f"the shards in '{folder}' hold {indexed} samples and their accounts say {kept}; remove the shard that was changed "
            "(see `python -m data.prepare verify`), and the same command makes it again."
        )
    tidy(folder)
    write_sums(folder, accounts)
    summary: dict[str, Any] = {
        "samples": kept,
        "shards": len(tars),
        "bytes": sum(stats.get("bytes", 0) for stats in accounts),
        "left_out": dict(sorted(reasons.items())),
        "faults": faults[:_FAULTS_SHOWN],
        "sums": dict(sums),
        "read": made,
        "seconds": seconds,
        "settings": asdict(settings),
    }
    write_json(folder / SUMMARY_FILE, summary)
    left = f"; left out: {_counted(reasons)}" if reasons else ""
    return f"{done}; {folder} holds {kept} samples in {len(tars)} shards{left}", summary


def _counted(reasons: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
