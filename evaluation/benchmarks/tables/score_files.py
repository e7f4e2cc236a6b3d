"""Computations on score files: spread over seeds, paired differences, and their tables."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.reports.markdown import score_file_markdown, spread
from evaluation.reports.result_file import check_writable, read_result, write_result
from evaluation.user_errors import as_user_errors

if TYPE_CHECKING:
    from evaluation.benchmarks.tables.options import PairedOptions, SeedsOptions, ShowOptions

REPORTED = ("shape_score", "clean_images", "fid", "clip_score", "caption_accuracy", "attribute_accuracy")
COMPARED = ("shape_score", "clean_images", "fid", "clip_score", "caption_accuracy", "diversity")
MALFORMED = (LookupError, TypeError, AttributeError, ArithmeticError, StopIteration)
"""What a score file of another form causes."""
SHARED = ("base_sha256", "teacher_guidance_scale", "student_updates")
"""Keys, besides the protocol, in which reports of one setting must agree."""


def named_folders(
    option: str, example: str, given: Sequence[str], taken: Collection[str] = ()
) -> dict[str, str]:
    """Folders by the name of their row, of an option's NAME=FOLDER.

    Args:
        option: with its dashes.
        example: of a value.
        given: the option's values.
        taken: names that other rows have.

    Raises:
        ValueError: for another form, or a name of two rows, of which one would replace the other.
    """
    found: dict[str, str] = {}
    for argument in given:
        name, _, folder = argument.partition("=")
        if not (name and folder):
            raise ValueError(f"{option} takes NAME=FOLDER, such as {example}, got '{argument}'.")
        if name in found or name in taken:
            raise ValueError(f"{option} '{argument}': there is another row '{name}'; give it another name.")
        found[name] = folder
    return found


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

    Raises:
        ValueError: for a file that something else wrote, which stays as it is.
        OSError: for one that cannot be written.
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
        check_writable(path)
        stored = read_result(path) if path.is_file() else {}
        rows = stored.get(key)
        lacking = [name for name in (*settings, key) if name not in stored]
        if stored and (lacking or not isinstance(rows, dict) or not all(map(_is_dict, rows.values()))):
            what = f"it has no {lacking[0]}" if lacking else f"its {key} are none"
            raise ValueError(f"'{path}' is there and is not of this command ({what}); give another file.")
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


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict)


@as_user_errors()
def show(options: ShowOptions) -> str:
    """Prints the tables."""
    tables = []
    for path in options.files:
        content = read_result(path)
        try:
            tables.append(f"{path}\n\n{score_file_markdown(content)}")
        except (*MALFORMED, ValueError) as error:
            raise ValueError(f"{path} is not a score file, or a damaged one ({error!r})") from error
    return "\n".join(tables).rstrip()


@as_user_errors()
def seeds(options: SeedsOptions) -> str:
    """Summarises reports."""
    try:
        return write_scores(
            options.out, summarise_scores({str(path): read_result(path) for path in options.reports})
        )
    except KeyError as error:
        raise ValueError(f"a report has no field {error}") from error
    except MALFORMED as error:
        raise ValueError(f"a report is not one of a run, or a damaged one ({error!r})") from error


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
        if first == second:
            raise ValueError(f"--pairs has '{text}', the difference of a row from itself")
        pairs.append((first, second))
    rows = read_result(options.table).get("rows", {})
    try:
        found = {f"{one}:{other}": mean_differences(rows, one, other) for one, other in pairs}
    except MALFORMED as error:
        raise ValueError(
            f"{options.table} is not a score file of recipes, or a damaged one ({error!r})"
        ) from error
    return write_scores(options.out, {"differences": found})


def mean_differences(rows: Mapping[str, Any], first: str, second: str) -> dict[str, dict[str, float]]:
    """Mean over the common seeds of the first row minus the second, and its standard error, for each score.

    Raises:
        ValueError: for fewer than two common seeds, or if both rows have no score in common.
    """
    result = {}
    for score in COMPARED:
        if any(name in rows and rows[name].get(score) is None for name in (first, second)):
            continue  # an older table has fewer scores, or the row's runs had not this one
        found = seed_differences(rows, first, second, score)
        if len(found) < 2:
            raise ValueError(
                f"{first}:{second}, {score}: a standard error needs two or more common seeds, got {len(found)}"
            )
        result[score] = {
            "mean": statistics.fmean(found),
            "standard_error": statistics.stdev(found) / len(found) ** 0.5,
            "differences": len(found),
        }
    if not result:
        raise ValueError(f"the rows {first} and {second} have none of {', '.join(COMPARED)} in common")
    return result


def seed_differences(rows: Mapping[str, Any], first: str, second: str, score: str) -> list[float]:
    """First row minus second for every common seed.

    Rows of one seed share noise, prompts and initial students, so their difference varies less than each of them.

    Raises:
        ValueError: for a missing row, or one without values by seed.
    """
    by_seed: list[dict[int, float | None]] = []
    for name in (first, second):
        if name not in rows or "values" not in (rows[name][score] or {}):
            raise ValueError(f"there are no values of '{name}' by seed; there are {', '.join(rows)}")
        seeds, values = rows[name]["seeds"], rows[name][score]["values"]
        if len(seeds) != len(values):
            raise ValueError(f"'{name}' has {len(seeds)} seeds and {len(values)} values of {score}")
        by_seed.append(dict(zip(seeds, values, strict=True)))
    found = [(value, by_seed[1].get(seed)) for seed, value in by_seed[0].items()]
    return [one - other for one, other in found if one is not None and other is not None]
