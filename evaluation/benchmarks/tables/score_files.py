"""Computations on score files: spread over seeds, paired differences, and their tables."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.reports.markdown import score_file_markdown, spread
from evaluation.reports.result_file import write_result
from evaluation.user_errors import as_user_errors

if TYPE_CHECKING:
    from evaluation.benchmarks.tables.options import PairedOptions, SeedsOptions, ShowOptions

REPORTED = ("shape_score", "clean_images", "fid", "clip_score", "caption_accuracy", "attribute_accuracy")
COMPARED = ("shape_score", "clean_images", "fid", "clip_score", "caption_accuracy", "diversity")
SHARED = ("base_sha256", "teacher_guidance_scale", "student_updates")
"""Keys, besides the protocol, in which reports of one setting must agree."""


def read_scores(path: Path) -> dict[str, Any]:
    """The content of a score file.

    Raises:
        ValueError: if it is not a JSON object.
    """
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a score file: its JSON is not an object")
    return content


def write_scores(path: Path | None, content: Mapping[str, Any]) -> str:
    """Write a score file if a path is given; returns its table."""
    if path is not None:
        write_result(path, content)
    return score_file_markdown(content)


class KeptRows:
    """Rows of a score file that outlive an interruption: each is written as soon as it is measured, beside the known ones.

    Args:
        path: of the file; its rows are known if it was written with the same settings.
        settings: what all rows depend on.
        content: makes the file's content, with the settings, of rows.
        key: of the rows in the content.
    """

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, Any],
        content: Callable[[dict[str, Any]], dict[str, Any]],
        key: str = "rows",
    ) -> None:
        self._path, self._content = path, content
        self._rows: dict[str, Any] = {}
        stored = read_scores(path) if path.is_file() else {}
        same = all(stored.get(name) == value for name, value in settings.items())
        self.known: dict[str, Any] = stored.get(key, {}) if same else {}
        """Rows of the file, by name."""

    def add(self, name: str, row: Any) -> None:
        """Takes a row, known or new."""
        self._rows[name] = row
        write_scores(self._path, self._content(self.known | self._rows))

    def finish(self) -> str:
        """Drops the known rows that were not added again; returns the table."""
        return write_scores(self._path, self._content(self._rows))


@as_user_errors()
def show(options: ShowOptions) -> str:
    """Prints the tables."""
    tables = []
    for path in options.files:
        try:
            tables.append(f"{path}\n\n{score_file_markdown(read_scores(path))}")
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a score file ({error!r})") from error
    return "\n".join(tables).rstrip()


@as_user_errors()
def seeds(options: SeedsOptions) -> str:
    """Summarises reports."""
    try:
        return write_scores(
            options.out, summarise_scores({str(path): read_scores(path) for path in options.reports})
        )
    except KeyError as error:
        raise ValueError(f"a report has no field {error}") from error


def summarise_scores(reports: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Mean, minimum and maximum of the students' scores over several reports.

    Args:
        reports: reports of `evaluation.callbacks.run_report` by file name.

    Raises:
        ValueError: for reports of different protocols, bases or lengths, or with the same seed.
    """
    first_name, first = next(iter(reports.items()))
    for name, report in reports.items():
        for field, here, there in (
            ("protocol", report["protocol"]["fingerprint"], first["protocol"]["fingerprint"]),
            *((key, report[key], first[key]) for key in SHARED),
        ):
            if here != there:
                raise ValueError(
                    f"{name} has {field} {here} and {first_name} has {there}: the runs are not comparable."
                )
    found = [report["seed"] for report in reports.values()]
    if len(set(found)) < len(found):
        raise ValueError(f"the reports have the seeds {found}; give one report for each seed.")
    rows = {
        row: {
            key: spread([report[row][key] for report in reports.values()])
            for key in REPORTED
            if all(key in report[row] for report in reports.values())  # older reports have fewer scores
        }
        for row in ("student_before", "student")
    }
    ratios = {
        key: spread([report[key] for report in reports.values()])
        for key in ("fid_ratio", "caption_accuracy_ratio")
    }
    kept = {key: first[key] for key in (*SHARED, "protocol", "versions")}
    seconds = {str(report["seed"]): report["seconds"] for report in reports.values()}
    return {"seeds": found, **rows, **ratios, "seconds": seconds, **kept}


@as_user_errors()
def paired(options: PairedOptions) -> str:
    """Compares rows of a score file."""
    pairs = []
    for text in options.pairs:
        first, separator, second = text.partition(":")
        if not (first and separator and second):
            raise ValueError(f"--pairs takes ROW:ROW, got '{text}'")
        pairs.append((first, second))
    found = mean_differences(read_scores(options.table).get("rows", {}), pairs)
    return write_scores(options.out, {"pairs": list(options.pairs), **found})


def mean_differences(
    rows: Mapping[str, Any], pairs: Sequence[tuple[str, str]]
) -> dict[str, dict[str, float]]:
    """Mean difference of each score and its standard error, over all pairs of rows and seeds.

    Raises:
        ValueError: for fewer than two differences.
    """
    result = {}
    named = {name for pair in pairs for name in pair}
    for score in COMPARED:
        if any(name in rows and score not in rows[name] for name in named):
            continue  # an older table has fewer scores
        found = seed_differences(rows, pairs, score)
        if len(found) < 2:
            raise ValueError(f"{score}: a standard error needs at least two differences, got {len(found)}")
        result[score] = {
            "mean": statistics.fmean(found),
            "standard_error": statistics.stdev(found) / len(found) ** 0.5,
            "differences": len(found),
        }
    return result


def seed_differences(rows: Mapping[str, Any], pairs: Sequence[tuple[str, str]], score: str) -> list[float]:
    """First row minus second, for every pair of rows and every common seed.

    Rows of one seed share noise, prompts and initial students, so their difference varies less than each of them.

    Raises:
        ValueError: for a missing row, or one without values by seed.
    """
    found = []
    for pair in pairs:
        by_seed: list[dict[int, float | None]] = []
        for name in pair:
            if name not in rows or "values" not in (rows[name][score] or {}):
                raise ValueError(f"there are no values of '{name}' by seed; there are {', '.join(rows)}")
            by_seed.append(dict(zip(rows[name]["seeds"], rows[name][score]["values"], strict=True)))
        first, second = by_seed
        for seed in first.keys() & second.keys():
            one, other = first[seed], second[seed]
            if one is not None and other is not None:
                found.append(one - other)
    return found
