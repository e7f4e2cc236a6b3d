"""Rows of the recipes' table against each other, seed by seed: `python -m evaluation.benchmarks.paired FILE.json --pairs A:B C:D`."""

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

SCORES = ("fid", "clip_score", "caption_accuracy", "diversity")


def differences(rows: Mapping[str, Any], pairs: Sequence[tuple[str, str]], score: str) -> list[float]:
    """First row minus second, for every pair of rows and every seed that both have.

    Two rows of one seed share noise, prompts and the students that they start from, so their difference varies less than
    either does.

    Raises:
        ValueError: for a row that is not there, or was measured before single seeds were kept.
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


def compare(rows: Mapping[str, Any], pairs: Sequence[tuple[str, str]]) -> dict[str, dict[str, float]]:
    """Mean difference of each score and its standard error, over all pairs of rows and seeds."""
    result = {}
    for score in SCORES:
        found = differences(rows, pairs, score)
        if len(found) < 2:
            raise ValueError(f"{score}: a standard error needs two differences or more, got {len(found)}")
        error = statistics.stdev(found) / len(found) ** 0.5
        result[score] = {
            "mean": statistics.fmean(found),
            "standard_error": error,
            "differences": len(found),
        }
    return result


def _pair(text: str) -> tuple[str, str]:
    first, separator, second = text.partition(":")
    if not (first and separator and second):
        raise argparse.ArgumentTypeError(f"a pair is ROW:ROW, got '{text}'")
    return first, second


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.benchmarks.paired",
        description="Mean differences between rows of the recipes' table over pairs of equal seeds, with standard errors.",
        epilog="example: python -m evaluation.benchmarks.paired evaluation/results/toy_recipes.json --pairs segmented:dmd2 "
        "pruned_segmented:pruned_dmd2",
    )
    parser.add_argument("table", type=Path, help="what python -m evaluation.benchmarks.recipes wrote")
    parser.add_argument("--pairs", nargs="+", type=_pair, required=True, metavar="ROW:ROW")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    try:
        result = compare(json.loads(options.table.read_text())["rows"], options.pairs)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"paired: {error}")
    names = [":".join(pair) for pair in options.pairs]
    if options.out is not None:
        options.out.write_text(json.dumps({"pairs": names, **result}, indent=2) + "\n")
    table = Table("score", "difference", "standard error", "pairs", title=", ".join(names))
    for score, numbers in result.items():
        cells = f"{numbers['mean']:+.4f}", f"{numbers['standard_error']:.4f}", str(numbers["differences"])
        table.add_row(score, *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
