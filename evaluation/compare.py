"""Results side by side: `python -m evaluation.compare A.json B.json`. Numbers of different protocol hashes are refused."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation.reports.tables import LOWER_IS_BETTER, interval, markdown_table, number, title
from sdxs_lightning.core.errors import UserError

OLD_METRICS = ("fid", "clip_score", "caption_accuracy", "attribute_accuracy", "diversity")
"""Of results without intervals: one fingerprint for all."""


def read_result(path: Path) -> dict[str, Any]:
    """What `python -m evaluation.evaluate` wrote.

    Raises:
        UserError: for another file.
    """
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}' cannot be read as a result ({error}).") from error
    if isinstance(result, dict) and "metrics" not in result and "fingerprint" in result.get("protocol", {}):
        settings, samples = result["protocol"], result["protocol"]["samples"]
        result["metrics"] = {
            name: {
                "value": result[name],
                "samples": samples,
                "hash": settings["fingerprint"],
                "settings": settings,
            }
            for name in OLD_METRICS
            if name in result
        }
    if not isinstance(result, dict) or not result.get("metrics"):
        raise UserError(f"'{path}' is no result of `python -m evaluation.evaluate`: it has no `metrics`.")
    return result


def chosen_metrics(results: Mapping[str, Mapping[str, Any]], wanted: Sequence[str] | None) -> list[str]:
    """Metrics to put side by side: the wanted ones, or those that all results have.

    Raises:
        UserError: if a result lacks one, or if they share none.
    """
    first = next(iter(results.values()))["metrics"]
    if wanted is None:
        shared = [name for name in first if all(name in result["metrics"] for result in results.values())]
        if not shared:
            having = "; ".join(
                f"{label}: {', '.join(result['metrics'])}" for label, result in results.items()
            )
            raise UserError(f"the results share no metric ({having}).")
        return shared
    for label, result in results.items():
        lacking = [name for name in wanted if name not in result["metrics"]]
        if lacking:
            raise UserError(f"{label} has no {', '.join(lacking)}; it has {', '.join(result['metrics'])}.")
    return list(wanted)


def differences(first: Any, second: Any, name: str = "") -> list[str]:
    """In what two settings differ, as `key: a != b`."""
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        keys = dict.fromkeys([*first, *second])
        return [
            said
            for key in keys
            for said in differences(first.get(key), second.get(key), f"{name}.{key}" if name else key)
        ]
    return [] if first == second else [f"{name}: {first} != {second}"]


def refuse_what_differs(results: Mapping[str, Mapping[str, Any]], metrics: Sequence[str]) -> None:
    """Checks that each metric has one hash.

    Raises:
        UserError: naming what differs, and the metrics that do compare.
    """
    label, first = next(iter(results.items()))
    refused: dict[str, str] = {}
    for metric in metrics:
        for other_label, other in results.items():
            mine, theirs = first["metrics"][metric], other["metrics"][metric]
            if mine["hash"] != theirs["hash"] and metric not in refused:
                said = (
                    ", ".join(differences(mine["settings"], theirs["settings"]))
                    or "their protocol hashes differ"
                )
                refused[metric] = f"{title(metric)} of {label} and {other_label} do not compare ({said})"
    if refused:
        rest = [metric for metric in metrics if metric not in refused]
        advice = f"; --metrics {' '.join(rest)} compares" if rest else ""
        raise UserError(f"{'; '.join(refused.values())}{advice}.")


def labels_of(paths: Sequence[Path]) -> list[str]:
    """Short names that differ: file names, or paths where those are equal."""
    names = [path.stem for path in paths]
    if len(set(names)) == len(names):
        return names
    full = [os.path.splitext(os.path.abspath(path))[0] for path in paths]
    if len(set(full)) < len(full):
        raise UserError("one result was given twice.")
    common = len(os.path.commonpath(full))
    return [name[common:].lstrip("/") for name in full]


def comparison(results: Mapping[str, Mapping[str, Any]], metrics: Sequence[str]) -> str:
    """The table, in Markdown; the best value of a column is bold."""
    best = {}
    for metric in metrics:
        values = [result["metrics"][metric]["value"] for result in results.values()]
        best[metric] = min(values) if metric in LOWER_IS_BETTER else max(values)
    rows = []
    for label, result in results.items():
        cells = [label]
        for metric in metrics:
            entry = result["metrics"][metric]
            value = number(entry["value"])
            bold = f"**{value}**" if entry["value"] == best[metric] and len(results) > 1 else value
            cells.append(f"{bold} ({interval(entry)})" if interval(entry) else bold)
        rows.append(cells)
    first = next(iter(results.values()))["metrics"]
    header = ["", *(title(metric) + (" ↓" if metric in LOWER_IS_BETTER else " ↑") for metric in metrics)]
    notes = ", ".join(f"{title(m)} {first[m]['hash']} (N = {first[m]['samples']})" for m in metrics)
    return f"{markdown_table(header, rows)}\nProtocol hashes: {notes}. In brackets: 95 % intervals.\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.compare",
        description="Put results of `python -m evaluation.evaluate` side by side; refuses what does not compare.",
        epilog="example: python -m evaluation.compare student.json teacher.json --metrics fid clip_score",
        allow_abbrev=False,
    )
    parser.add_argument("results", nargs="+", type=Path, metavar="FILE.json")
    parser.add_argument("--metrics", nargs="+", metavar="NAME", help="default: those that all results have")
    parser.add_argument("--out", type=Path, metavar="FILE.md", help="write the table there too")
    options = parser.parse_args(arguments)
    try:
        labels = labels_of(options.results)
        results = {label: read_result(path) for label, path in zip(labels, options.results, strict=True)}
        metrics = chosen_metrics(results, options.metrics)
        refuse_what_differs(results, metrics)
        table = comparison(results, metrics)
        if options.out is not None:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(table)
    except (UserError, OSError) as error:
        sys.exit(f"compare: {error}")
    sys.stdout.write(table)


if __name__ == "__main__":
    main()
