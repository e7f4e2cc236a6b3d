"""Costs of recipes: what starting costs is taken off, and the rows share a unit."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from evaluation import recipe_costs
from evaluation.recipe_costs import measure_costs
from evaluation.recipe_runs import run_folder

BURN = """
import sys, time
flags = dict(flag.rpartition(".")[2].split("=") for flag in sys.argv[2:])
assert flags["fake_score_warmup_turns"] == "0"
end = time.process_time() + 0.3 + float(sys.argv[1]) * int(flags["max_student_updates"])
while time.process_time() < end: sum(range(20000))
"""


def test_an_update_costs_what_it_costs_without_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = {"warmup": 0.02, "dmd2": 0.06}

    def pretend(root: Path, row: str, seed: int) -> list[str]:
        return [sys.executable, "-c", BURN, str(seconds[row])]

    monkeypatch.setattr(recipe_costs, "command", pretend)
    for row, updates in (("warmup", 800), ("dmd2", 120)):
        folder = run_folder(tmp_path, row, 0)
        folder.mkdir(parents=True)
        text = f"model: {{init_args: {{curriculum: {{max_student_updates: {updates}}}}}}}"
        (folder / "config.yaml").write_text(text)
    costs = measure_costs(["warmup", "dmd2"], 10, tmp_path)
    assert costs["warmup"]["cpu_seconds_per_update"] == pytest.approx(0.02, rel=0.25)
    assert costs["dmd2"]["cpu_seconds_per_update"] == pytest.approx(0.06, rel=0.25)
    assert costs["warmup"]["relative_cost"] == 1
    assert costs["dmd2"]["relative_cost"] == pytest.approx(120 * 0.06 / (800 * 0.02), rel=0.3)


def test_a_failing_run_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = [sys.executable, "-c", "raise SystemExit('no such base')"]
    monkeypatch.setattr(recipe_costs, "command", lambda *_: line)
    with pytest.raises(RuntimeError, match="dmd2: no such base"):
        measure_costs(["dmd2"], 10, tmp_path)
