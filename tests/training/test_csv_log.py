"""One metrics.csv for a run that is resumed."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdxs_lightning.training.csv_log import RunCSVLogger


def logged(folder: Path, steps: Mapping[int, dict[str, Any]], resumed: bool) -> None:
    logger = RunCSVLogger(str(folder))
    logger.resumed = resumed
    for step, scalars in steps.items():
        logger.log_metrics(scalars, step)
    logger.finalize("success")


def rows(path: Path) -> list[tuple[int, dict[str, str]]]:
    with path.open(newline="") as file:
        return [
            (int(row.pop("step")), {name: value for name, value in row.items() if value})
            for row in csv.DictReader(file)
        ]


def test_a_resumed_run_continues_the_file_from_its_checkpoint(tmp_path: Path) -> None:
    logged(tmp_path, {0: {"loss": 3.0}, 50: {"loss": 2.0}, 100: {"loss": 9.0}, 150: {"loss": 9.0}}, False)
    logged(tmp_path, {100: {"loss": 1.0}, 150: {"loss": 0.5, "fid": 7.0}}, True)
    logged(tmp_path, {200: {"loss": 0.25}}, True)
    assert rows(tmp_path / "logs" / "metrics.csv") == [
        (0, {"loss": "3.0"}),
        (50, {"loss": "2.0"}),
        (100, {"loss": "1.0"}),
        (150, {"loss": "0.5", "fid": "7.0"}),
        (200, {"loss": "0.25"}),
    ]
    assert [path.name for path in (tmp_path / "logs").glob("*.csv")] == ["metrics.csv"]


def test_a_new_run_keeps_the_file_of_the_one_before(tmp_path: Path) -> None:
    for loss in (1.0, 2.0, 3.0):
        logged(tmp_path, {0: {"loss": loss}}, False)
    found = {path.name: rows(path) for path in (tmp_path / "logs").glob("*.csv")}
    assert found == {
        "metrics-1.csv": [(0, {"loss": "1.0"})],
        "metrics-2.csv": [(0, {"loss": "2.0"})],
        "metrics.csv": [(0, {"loss": "3.0"})],
    }


def test_resuming_without_a_file_begins_one(tmp_path: Path) -> None:
    logged(tmp_path, {70: {"loss": 1.0}}, True)
    assert rows(tmp_path / "logs" / "metrics.csv") == [(70, {"loss": "1.0"})]
