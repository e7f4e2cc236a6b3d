"""Results side by side: `python -m evaluation.compare A.json B.json`. Numbers of different protocol hashes are refused."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, ClassVar

from evaluation.protocols.names import CAPTION_METRICS
from evaluation.reports.markdown import LOWER_IS_BETTER, interval, markdown_table, number, title
from evaluation.user_errors import as_user_errors
from sdxs_lightning.command_line import Option, run_command
from sdxs_lightning.core.errors import UserError

OLD_METRICS = ("fid", "clip_score", "caption_accuracy", "attribute_accuracy", "diversity")
"""Metrics in old results without intervals, which have one fingerprint for all metrics."""

TIME = "ms_per_image"
"""Milliseconds of one image of a model, beside its metrics; of the machine that measured it."""


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """Puts results of `python -m evaluation.evaluate` side by side; refuses numbers that are not comparable."""

    EXAMPLES: ClassVar[str] = (
        "python -m evaluation.compare student.json teacher.json --metrics fid clip_score"
    )

    results: Annotated[tuple[Path, ...], Option(positional=True)]
    """Results, FILE.json."""
    metrics: tuple[str, ...] = ()
    """Metrics; by default those that all results have."""
    out: Annotated[Path | None, Option(metavar="FILE.md")] = None
    """Writes the table there too."""


def read_result(path: Path) -> dict[str, Any]:
    """Read a result of `python -m evaluation.evaluate`.

    Raises:
        UserError: if the file is not a result.
    """
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"'{path}' cannot be read as a result ({error}).") from error
    settings = result.get("protocol") if isinstance(result, dict) and "metrics" not in result else None
    if isinstance(settings, dict) and {"fingerprint", "samples"} <= settings.keys():
        samples = settings["samples"]
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
        raise UserError(f"'{path}' is not a result of `python -m evaluation.evaluate`: it has no 'metrics'.")
    problem = _problem(result["metrics"])
    if problem is not None:
        raise UserError(f"'{path}' is not a result of `python -m evaluation.evaluate`: {problem}.")
    return result


def _problem(metrics: Any) -> str | None:
    """What is wrong in `metrics`, which may have been written by hand or by another program."""
    if not isinstance(metrics, dict):
        return f"its 'metrics' are a {type(metrics).__name__}, not an object"
    for name, entry in metrics.items():
        if not isinstance(entry, dict) or not {"value", "samples", "hash", "settings"} <= entry.keys():
            return f"its metric {name} lacks 'value', 'samples', 'hash' or 'settings'"
        numbers = [entry["value"], entry["samples"], *(entry.get(key) or 0.0 for key in ("low", "high"))]
        if not all(type(one) in (int, float) and math.isfinite(one) for one in numbers):
            return f"'value', 'samples', 'low' or 'high' of its metric {name} is no finite number"
        if not isinstance(entry["settings"], dict):
            return f"'settings' of its metric {name} are no object"
    return None


def chosen_metrics(results: Mapping[str, Mapping[str, Any]], wanted: Sequence[str]) -> list[str]:
    """The wanted metrics, or those that all results have.

    Raises:
        UserError: if a result lacks one, or if they share none.
    """
    first = next(iter(results.values()))["metrics"]
    if not wanted:
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


def setting_differences(first: Any, second: Any, name: str = "") -> list[str]:
    """Differences of two settings, each as `key: a != b`."""
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        keys = dict.fromkeys([*first, *second])
        return [
            difference
            for key in keys
            for difference in setting_differences(
                first.get(key), second.get(key), f"{name}.{key}" if name else key
            )
        ]
    return [] if first == second else [f"{name}: {first} != {second}"]


def require_equal_hashes(results: Mapping[str, Mapping[str, Any]], metrics: Sequence[str]) -> None:
    """Check that each metric has the same hash in all results.

    The prompts of stored images are unknown. Metrics that read no captions may compare them with images of a model, if no
    other setting differs.

    Raises:
        UserError: with the differences, and the metrics that are comparable.
    """
    refused: dict[str, str] = {}
    for metric in metrics:
        for (label, first), (other_label, other) in combinations(results.items(), 2):
            mine, theirs = first["metrics"][metric], other["metrics"][metric]
            if mine["hash"] == theirs["hash"] or metric in refused:
                continue
            settings = [dict(one["settings"]) for one in (mine, theirs)]
            if metric not in CAPTION_METRICS and None in [one.get("captions", "") for one in settings]:
                settings = [{**one, "captions": None} for one in settings]
                if settings[0] == settings[1]:
                    continue
            reason = (
                ", ".join(setting_differences(settings[0], settings[1])) or "their protocol hashes differ"
            )
            refused[metric] = f"{title(metric)} of {label} and {other_label} are not comparable ({reason})"
    if refused:
        rest = [metric for metric in metrics if metric not in refused]
        advice = f"; --metrics {' '.join(rest)} compares" if rest else ""
        raise UserError(f"{'; '.join(refused.values())}{advice}.")


def labels_of(paths: Sequence[Path]) -> list[str]:
    """Distinct short names: file names, or paths for equal file names."""
    names = [path.stem for path in paths]
    if len(set(names)) == len(names):
        return names
    full = [os.path.splitext(os.path.abspath(path))[0] for path in paths]
    if len(set(full)) < len(full):
        raise UserError("one result was given twice.")
    common = len(os.path.commonpath(full))
    return [name[common:].lstrip("/") for name in full]


def comparison(results: Mapping[str, Mapping[str, Any]], metrics: Sequence[str]) -> str:
    """The table as Markdown; the best value of a column is bold."""
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
    times = [result.get(TIME) for result in results.values()]
    if any(time is not None for time in times):
        header.append(title(TIME))
        rows = [[*cells, number(time)] for cells, time in zip(rows, times, strict=True)]
    notes = ", ".join(f"{title(m)} {first[m]['hash']} (N = {first[m]['samples']})" for m in metrics)
    return f"{markdown_table(header, rows)}\nProtocol hashes: {notes}. In brackets: 95 % intervals."


def differences(results: Mapping[str, Mapping[str, Any]], metrics: Sequence[str]) -> str:
    """A table of each further result minus the first, with the 95 % interval of the difference; "" for a single result.

    Sample i of one is paired with sample i of the other: of models they share prompt and noise.
    """
    # Imports torch: here, so that --help and refusals do not wait for it.
    from evaluation.metrics.estimates import difference

    (label, first), *others = results.items()
    rows = []
    for other_label, other in others:
        for metric in metrics:
            mine, theirs = first["metrics"][metric], other["metrics"][metric]
            value = theirs["value"] - mine["value"]
            found = difference(value, theirs, mine)
            low_high = "" if found is None else interval(found.as_dict())
            rows.append([other_label, title(metric), f"{value:+.5g}", low_high])
    if not rows:
        return ""
    return f"Minus {label}:\n\n{markdown_table(['', 'metric', 'difference', '95 % interval'], rows)}"


@as_user_errors()
def compare(options: CompareOptions) -> str:
    """Read the results and return their table."""
    labels = labels_of(options.results)
    results = {label: read_result(path) for label, path in zip(labels, options.results, strict=True)}
    metrics = chosen_metrics(results, options.metrics)
    require_equal_hashes(results, metrics)
    table = "\n\n".join(filter(None, (comparison(results, metrics), differences(results, metrics).rstrip())))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(f"{table}\n")
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    run_command("python -m evaluation.compare", CompareOptions, compare, arguments)


if __name__ == "__main__":
    main()
