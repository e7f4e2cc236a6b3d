"""The recipes of the toy world: their command lines, what is run again, and what runs cost."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from data.prepare.pairs.options import PairOptions
from evaluation.benchmarks.tables import recipe_runs
from evaluation.benchmarks.tables import scores as toy_scores
from evaluation.benchmarks.tables.__main__ import main
from evaluation.benchmarks.tables.recipe_runs import (
    COST,
    MODEL,
    PRUNED,
    RECIPES,
    command,
    cpu_seconds,
    run_folder,
    total_cpu_seconds,
    train_recipe,
)
from evaluation.protocols.protocols import REPOSITORY
from sdxs_lightning.cli import TrainingCLI
from sdxs_lightning.command_line import parse_options
from sdxs_lightning.core.errors import RunStopped
from tests.helpers.refusals import refusal
from tests.helpers.tiny_run import ROOT

DISTINCT = {(recipe.configs, recipe.flags): row for row, recipe in RECIPES.items()}
"""One row of those that differ by their start alone, by settings."""


@pytest.mark.parametrize("row", DISTINCT.values())
def test_a_recipes_command_parses(
    row: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    line = command(tmp_path, row, 3)
    assert line[:2] == [sys.executable, "train.py"] and (REPOSITORY / "train.py").is_file()
    with pytest.raises(SystemExit) as end:
        TrainingCLI([*line[2:], "--print_config"])
    assert end.value.code in (0, None)
    printed = capsys.readouterr().out
    assert "seed_everything: 3" in printed and str(run_folder(tmp_path, row, 3)) in printed


def test_the_command_that_makes_the_pairs_parses(capsys: pytest.CaptureFixture[str]) -> None:
    options = parse_options(PairOptions, recipe_runs.PAIR_OPTIONS.split())
    assert (options.guidance_scale, options.count, options.batch_size) == (1.5, 8192, 64)
    assert capsys.readouterr().err == ""  # no former name


def test_a_recipe_starts_from_the_student_of_the_same_seed(tmp_path: Path) -> None:
    weights = f"{MODEL}student.init_args.weights="
    assert f"{weights}{tmp_path}/warmup/seed2/pipeline" in command(tmp_path, "dmd2", 2)
    assert f"{weights}{PRUNED}" in command(tmp_path, "pruned_warmup", 0)
    assert f"{weights}null" in command(tmp_path, "warmup", 0)


def finish(root: Path, row: str, seed: int) -> None:
    folder = run_folder(root, row, seed) / "pipeline"
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")


def test_finished_recipes_are_not_run_again_and_missing_ones_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    def pretend(root: Path, row: str, seed: int) -> list[str]:
        ran.append(row)
        folder = run_folder(root, row, seed) / "pipeline"
        code = f"import pathlib; p = pathlib.Path({str(folder)!r}); p.mkdir(); (p / 'model_index.json').write_text('')"
        return [sys.executable, "-c", code]

    monkeypatch.setattr(recipe_runs, "command", pretend)
    finish(tmp_path, "dmd2", 0)
    train_recipe(tmp_path, "dmd2", 0)
    assert ran == []
    train_recipe(tmp_path, "dmd2+finish", 1)
    assert ran == ["warmup", "dmd2", "dmd2+finish"]
    stages = [cpu_seconds(run_folder(tmp_path, row, 1)) for row in ran]
    assert min(stages) > 0 and cpu_seconds(run_folder(tmp_path, "dmd2", 0)) == 0
    assert total_cpu_seconds(tmp_path, "dmd2+finish", 1) == pytest.approx(sum(stages))
    finish(tmp_path, "dmd2+finish", 0)
    shutil.copy(run_folder(tmp_path, "dmd2", 1) / COST, run_folder(tmp_path, "dmd2+finish", 0))
    assert total_cpu_seconds(tmp_path, "dmd2+finish", 0) is None  # its start's is not recorded


def test_finished_only_starts_no_run_and_scores_the_seeds_that_exist(
    tmp_path: Path,
    toy_networks: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    row = {
        "clip_score": 1.0,
        "caption_accuracy": 0.5,
        "attribute_accuracy": 0.6,
        "diversity": 0.1,
        "parameters": 7,
    }
    monkeypatch.setattr(
        toy_scores, "student_scores", lambda root, row_, seed, scorer: row | {"fid": float(seed)}
    )
    monkeypatch.setattr(recipe_runs, "command", lambda *_: pytest.fail("a run was started"))
    arguments = f"recipes --root {tmp_path} --seeds 1 2 --rows warmup dmd2 --finished-only".split()
    assert "recipes: none of these rows has finished" in refusal(main, arguments, capsys)
    for seed in (1, 2):
        finish(tmp_path, "warmup", seed)
    arguments = f"recipes --root {tmp_path} --seeds 1 2 --finished_only".split()  # all rows
    main([*arguments, "--out", str(tmp_path / "table.json")])
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert (
        list(rows) == ["warmup"]
        and rows["warmup"]["seeds"] == [1, 2]
        and rows["warmup"]["fid"]["mean"] == 1.5
    )
    assert "| warmup | 1.50 (1.00 to 2.00) | 1.0 | 50.0 |" in capsys.readouterr().out


def test_no_row_is_trained_that_is_not_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(recipe_runs, "command", lambda *_: pytest.fail("a run was started"))
    said = refusal(main, ["recipes", "--seeds", "0"], capsys)
    assert f"--rows is missing, and all {len(RECIPES)} recipes are not trained unasked" in said


def test_the_cost_of_an_interrupted_run_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "print('oh'); sum(range(10**7)); raise SystemExit(143)"
    monkeypatch.setattr(recipe_runs, "command", lambda root, row, seed: [sys.executable, "-c", code])
    costs = []
    for _ in range(2):
        with pytest.raises(RunStopped, match=r"warmup with seed 0 ended with exit code 143; see .*log.txt"):
            train_recipe(tmp_path, "warmup", 0)
        costs.append(cpu_seconds(run_folder(tmp_path, "warmup", 0)))
    assert costs[1] > 1.5 * costs[0] > 0
    assert (run_folder(tmp_path, "warmup", 0) / "log.txt").read_text() == "oh\noh\n"
