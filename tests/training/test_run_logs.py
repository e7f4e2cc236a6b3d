"""Logs other than CSV go on where a resumed run goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sdxs_lightning.training.run_logs import RunJSONLogger, RunTensorBoardLogger, RunWandbLogger

FIRST: dict[int, dict[str, Any]] = {
    0: {"loss": 3.0},
    50: {"loss": 2.0},
    100: {"loss": 9.0},
    150: {"loss": float("nan")},
}
RESUMED: dict[int, dict[str, Any]] = {100: {"loss": 1.0}, 150: {"loss": 0.5, "ranks/slowest_host": "n2"}}


def logged(logger: Any, steps: dict[int, Any], resumed: bool) -> None:
    logger.resumed = resumed
    for step, scalars in steps.items():
        logger.log_metrics(scalars, step)
    logger.finalize("success")


def test_json_lines_go_on_from_the_checkpoint(tmp_path: Path) -> None:
    logged(RunJSONLogger(str(tmp_path)), FIRST, False)
    path = tmp_path / "logs" / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[-1]["loss"] is None
    assert lines[0]["time"] > 1.7e9
    with path.open("a") as file:
        file.write('{"step": 160, "lo')  # killed while writing
    logged(RunJSONLogger(str(tmp_path)), RESUMED, True)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(0, 3.0), (50, 2.0), (100, 1.0), (150, 0.5)]
    assert lines[-1]["ranks/slowest_host"] == "n2"
    logged(RunJSONLogger(str(tmp_path)), {0: {"loss": 4.0}}, False)
    assert [len(one.read_text().splitlines()) for one in sorted(path.parent.iterdir())] == [4, 1]


def test_tensorboard_shows_one_curve(tmp_path: Path) -> None:
    logged(RunTensorBoardLogger(str(tmp_path)), {step: FIRST[step] for step in (0, 50, 100)}, False)
    logged(
        RunTensorBoardLogger(str(tmp_path)), {step: {"loss": RESUMED[step]["loss"]} for step in RESUMED}, True
    )
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (0, 3.0),
        (50, 2.0),
        (100, 1.0),
        (150, 0.5),
    ]


def test_wandb_goes_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DISABLE_GIT", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for resumed in (False, True, False):
        logger = RunWandbLogger(str(tmp_path), offline=True)
        logged(logger, RESUMED, resumed)
        wandb.finish()
    wandb.teardown()  # ends the service process, which writes
    folders = sorted((tmp_path / "wandb").glob("offline-run-*"))
    ids = [folder.name.rpartition("-")[2] for folder in folders]
    assert len(folders) == 3
    assert len(set(ids)) == 2  # the resumed one has the id of the first
    assert (tmp_path / "wandb_id").read_text().strip() in ids
    for folder in folders:
        (file,) = folder.glob("run-*.wandb")
        assert b"ranks/slowest_host" in file.read_bytes()
