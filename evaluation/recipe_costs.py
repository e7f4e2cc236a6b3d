"""What a student update of each recipe costs, measured in one run: `python -m evaluation.recipe_costs --out FILE.json`.

The processor time that `evaluation.recipes` notes depends on what else ran meanwhile. Here every recipe makes a few updates,
one after the other on an otherwise idle machine; two runs of different length take out what starting costs.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from rich.console import Console
from rich.table import Table

from evaluation.machine import where
from evaluation.protocols import REPOSITORY
from evaluation.recipe_runs import MODEL, RECIPES, command, run_folder

SHORT = 2
"""Updates of the run whose time is taken off."""


def cpu_seconds_of(row: str, updates: int, root: Path) -> float:
    """Processor time of a run of so many student updates, without a warm-up of the fake score.

    Raises:
        RuntimeError: if train.py fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        line = [
            *command(root, row, 0),
            f"{MODEL}curriculum.max_student_updates={updates}",
            f"{MODEL}curriculum.fake_score_warmup_turns=0",
            f"--trainer.default_root_dir={folder}",
        ]
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        result = subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True, check=False)
        if result.returncode:
            raise RuntimeError(f"{row}: {result.stderr.strip().splitlines()[-1]}")
        return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before


def updates_of(row: str, root: Path) -> int:
    """Student updates of the whole recipe, from the configuration that its run was started with."""
    config = yaml.safe_load((run_folder(root, row, 0) / "config.yaml").read_text())
    return int(config["model"]["init_args"]["curriculum"]["max_student_updates"])


def measure_costs(rows: Sequence[str], updates: int, root: Path) -> dict[str, dict[str, float]]:
    """Seconds of one core per student update, and the recipe's whole cost in units of the first row's."""
    costs: dict[str, dict[str, float]] = {}
    for row in rows:
        spent = cpu_seconds_of(row, SHORT + updates, root) - cpu_seconds_of(row, SHORT, root)
        costs[row] = {"updates": updates_of(row, root), "cpu_seconds_per_update": spent / updates}
        Console(stderr=True).print(f"{row}: {costs[row]}")
    whole = {row: cost["updates"] * cost["cpu_seconds_per_update"] for row, cost in costs.items()}
    first = next(iter(whole.values()))
    return {row: costs[row] | {"relative_cost": whole[row] / first} for row in rows}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.recipe_costs",
        description="Measure what a student update of each recipe costs; the rows must have been run before, with seed 0.",
        epilog="example: python -m evaluation.recipe_costs --rows regression warmup dmd2 --out costs.json",
    )
    parser.add_argument("--rows", nargs="+", choices=list(RECIPES), required=True, metavar="ROW")
    parser.add_argument("--updates", type=int, default=10, help="that are timed, default: 10")
    parser.add_argument("--root", type=Path, default=Path("outputs/recipes"), help="default: %(default)s")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args(arguments)
    try:
        costs = measure_costs(options.rows, options.updates, options.root)
    except (RuntimeError, FileNotFoundError) as error:
        sys.exit(f"recipe_costs: {error}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"rows": costs, **where(torch.device("cpu"))}, indent=2) + "\n")
    table = Table("recipe", "updates", "cost of an update", "cost", caption="in units of the first row")
    unit = next(iter(costs.values()))["cpu_seconds_per_update"]
    for row, cost in costs.items():
        table.add_row(
            row,
            f"{cost['updates']:.0f}",
            f"{cost['cpu_seconds_per_update'] / unit:.2f}",
            f"{cost['relative_cost']:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
