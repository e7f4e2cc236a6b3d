"""The recipes of the toy world: their command lines, what is skipped, what is summarised."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from evaluation.benchmarks import recipe_runs, recipes
from evaluation.benchmarks.recipe_runs import MODEL, PRUNED, RECIPES, command, cpu_seconds, run_folder, train
from evaluation.benchmarks.recipes import summarise
from sdxs_lightning.cli import TrainingCLI
from tests.helpers.tiny_run import ROOT


@pytest.mark.parametrize("row", list(RECIPES))
def test_a_rows_command_parses(
    row: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    line = command(tmp_path, row, 3)
    assert line[:2] == [sys.executable, "train.py"]
    with pytest.raises(SystemExit) as end:
        TrainingCLI([*line[2:], "--print_config"])
    assert end.value.code in (0, None)
    printed = capsys.readouterr().out
    assert "seed_everything: 3" in printed and str(run_folder(tmp_path, row, 3)) in printed


def test_a_row_starts_from_the_student_of_the_same_seed(tmp_path: Path) -> None:
    assert f"{MODEL}student.init_args.weights={tmp_path}/warmup/seed2/pipeline" in command(
        tmp_path, "dmd2", 2
    )
    assert f"{MODEL}student.init_args.weights={PRUNED}" in command(tmp_path, "pruned_warmup", 0)
    assert f"{MODEL}student.init_args.weights=null" in command(tmp_path, "warmup", 0)


def finished(root: Path, row: str, seed: int) -> Path:
    folder = run_folder(root, row, seed) / "pipeline"
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    return folder


def test_what_is_there_is_not_run_again_and_what_is_missing_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    def pretend(root: Path, row: str, seed: int) -> list[str]:
        ran.append(row)
        folder = run_folder(root, row, seed) / "pipeline"
        code = f"import pathlib; p = pathlib.Path({str(folder)!r}); p.mkdir(); (p / 'model_index.json').write_text('')"
        return [sys.executable, "-c", code]

    monkeypatch.setattr(recipe_runs, "command", pretend)
    finished(tmp_path, "dmd2", 0)
    train(tmp_path, "dmd2", 0)
    assert ran == []
    train(tmp_path, "dmd2+finish", 1)
    assert ran == ["warmup", "dmd2", "dmd2+finish"]
    assert cpu_seconds(tmp_path / "dmd2" / "seed1") > 0
    assert cpu_seconds(tmp_path / "dmd2" / "seed0") == 0


def test_finished_only_starts_nothing_and_takes_the_seeds_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {
        "clip_score": 1.0,
        "caption_accuracy": 0.5,
        "attribute_accuracy": 0.6,
        "diversity": 0.1,
        "parameters": 7,
    }
    monkeypatch.setattr(recipes, "score", lambda root, row_, seed, *_: row | {"fid": float(seed)})
    monkeypatch.setattr(recipe_runs, "command", lambda *_: pytest.fail("a run was started"))
    arguments = ["--root", str(tmp_path), "--seeds", "1", "2", "--rows", "warmup", "dmd2", "--finished_only"]
    with pytest.raises(SystemExit, match="none of these rows was finished"):
        recipes.main(arguments)
    for name, seed in (("warmup", 1), ("warmup", 2)):
        finished(tmp_path, name, seed)
    recipes.main([*arguments, "--out", str(tmp_path / "table.json")])
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert (
        list(rows) == ["warmup"]
        and rows["warmup"]["seeds"] == [1, 2]
        and rows["warmup"]["fid"]["mean"] == 1.5
    )


def test_the_cost_of_an_interrupted_run_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "sum(range(10**7)); raise SystemExit(143)"
    monkeypatch.setattr(recipe_runs, "command", lambda root, row, seed: [sys.executable, "-c", code])
    costs = []
    for _ in range(2):
        with pytest.raises(RuntimeError, match="exit code 143"):
            train(tmp_path, "warmup", 0)
        costs.append(cpu_seconds(run_folder(tmp_path, "warmup", 0)))
    assert costs[1] > 1.5 * costs[0] > 0


def test_a_failed_run_stops_the_rest_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = [sys.executable, "-c", "print('oh'); raise SystemExit(3)"]
    monkeypatch.setattr(recipe_runs, "command", lambda root, row, seed: list(line))
    with pytest.raises(RuntimeError, match=r"warmup with seed 0 ended with exit code 3; see .*log.txt"):
        train(tmp_path, "warmup", 0)
    assert (run_folder(tmp_path, "warmup", 0) / "log.txt").read_text() == "oh\n"


def test_summary_has_mean_and_range_over_seeds() -> None:
    def scores(fid: float) -> dict[str, Any]:
        rest = {
            "clip_score": 1.0,
            "caption_accuracy": 0.5,
            "attribute_accuracy": 0.6,
            "diversity": 0.1,
            "cpu_seconds": 3.0,
        }
        return {"fid": fid, **rest, "parameters": 7}

    summary = summarise({"dmd2": {0: scores(1.0), 5: scores(4.0)}})
    assert summary["dmd2"]["fid"] == {"mean": 2.5, "smallest": 1.0, "largest": 4.0, "values": [1.0, 4.0]}
    unknown = scores(1.0) | {"cpu_seconds": None}  # not written down is not 0
    assert summarise({"dmd2": {0: unknown}})["dmd2"]["cpu_seconds"] is None
    partly = summarise({"dmd2": {0: unknown, 1: scores(1.0)}})["dmd2"]["cpu_seconds"]
    assert partly is not None and (partly["mean"], partly["values"]) == (3.0, [None, 3.0])
    assert summary["dmd2"]["seeds"] == [0, 5] and summary["dmd2"]["parameters"] == 7
