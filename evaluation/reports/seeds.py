"""Several runs that differ in their seed, in one table: `python -m evaluation.reports.seeds REPORT.json ... --out FILE.json`."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

MEASURED = ("fid", "clip_score", "caption_accuracy", "attribute_accuracy")
SHARED = ("base_sha256", "teacher_guidance_scale", "student_updates")
"""What reports have to agree in, besides the protocol, to be runs of one setting."""


def summarise(reports: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Mean, smallest and largest of what the students of several reports score.

    Args:
        reports: by file name, as `evaluation.callbacks.run_report` writes them.

    Raises:
        ValueError: for reports of different protocols, bases or lengths, or twice the same seed.
    """
    first_name, first = next(iter(reports.items()))
    for name, report in reports.items():
        for what, mine, theirs in (
            ("protocol", report["protocol"]["fingerprint"], first["protocol"]["fingerprint"]),
            *((key, report[key], first[key]) for key in SHARED),
        ):
            if mine != theirs:
                raise ValueError(
                    f"{name} has {what} {mine} and {first_name} has {theirs}: these runs do not compare; measure them alike."
                )
    seeds = [report["seed"] for report in reports.values()]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"the reports have the seeds {seeds}; give one report for each seed.")
    rows = {
        which: {key: spread([report[which][key] for report in reports.values()]) for key in MEASURED}
        for which in ("student_before", "student")
    }
    ratios = {
        key: spread([report[key] for report in reports.values()])
        for key in ("fid_ratio", "caption_accuracy_ratio")
    }
    kept = {key: first[key] for key in (*SHARED, "protocol", "versions")}
    seconds = {str(report["seed"]): report["seconds"] for report in reports.values()}
    return {"seeds": seeds, **rows, **ratios, "seconds": seconds, **kept}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, smallest and largest."""
    return {"mean": statistics.fmean(values), "smallest": min(values), "largest": max(values)}


def show(summary: Mapping[str, Any]) -> None:
    """A table on the terminal."""
    table = Table("", "FID", "CLIP score", "all right", "attributes", title=f"seeds {summary['seeds']}")
    for which in ("student_before", "student"):
        row = summary[which]
        cells = [_cell(row[key], 100.0 if "accuracy" in key else 1.0) for key in MEASURED]
        table.add_row(which.replace("_", " "), *cells)
    Console().print(table)
    for key in ("fid_ratio", "caption_accuracy_ratio"):
        Console().print(f"{key} to the many-step teacher: {_cell(summary[key])}")


def _cell(spread: Mapping[str, float], factor: float = 1.0) -> str:
    mean, low, high = (factor * spread[key] for key in ("mean", "smallest", "largest"))
    return f"{mean:.2f} ({low:.2f} to {high:.2f})"


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.reports.seeds",
        description="Summarise the report.json files of runs that differ in their seed.",
        epilog="example: python -m evaluation.reports.seeds outputs/seed0/report.json outputs/seed1/report.json --out seeds.json",
    )
    parser.add_argument("reports", nargs="+", type=Path, help="report.json files of one setting")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    try:
        summary = summarise({str(path): json.loads(path.read_text()) for path in options.reports})
        if options.out is not None:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(summary, indent=2) + "\n")
    except (OSError, KeyError, ValueError) as error:
        sys.exit(f"seeds: {f'no field {error} in a report' if isinstance(error, KeyError) else error}")
    show(summary)


if __name__ == "__main__":
    main()
