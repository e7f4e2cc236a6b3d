"""Logs of a run that go on as one curve when it is interrupted and resumed: JSON lines, TensorBoard, Weights & Biases."""

from __future__ import annotations

import json
import math
import os
import time
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only


class RunLog:
    """A logger that is told whether the run resumes."""

    resumed = False
    """Whether this run resumes from a checkpoint; set before training begins."""


def renamed_aside(path: Path) -> None:
    """Renames the file of an earlier run, if there is one: metrics.csv to metrics-1.csv, metrics-2.csv, ..."""
    if not path.is_file():
        return
    number = 1
    while (kept := path.with_name(f"{path.stem}-{number}{path.suffix}")).exists():
        number += 1
    path.rename(kept)


class RunJSONLogger(RunLog, Logger):
    """Writes SAVE_DIR/NAME/metrics.jsonl: an object a line with `step`, `time` (seconds since 1970) and what was logged.

    Values that are not finite become null. A resumed run replaces the lines from its first logged step on, which it computes
    again; a new run renames the file of an earlier one.

    Args:
        save_dir: the run's folder.
        name: folder in it.
    """

    def __init__(self, save_dir: str, name: str = "logs") -> None:
        super().__init__()
        self.path = Path(save_dir, name, "metrics.jsonl")
        self._begun = False

    @property
    def name(self) -> str:
        """Folder of the file."""
        return self.path.parent.name

    @property
    def version(self) -> str:
        """None: a run has one file."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run's folder."""
        return str(self.path.parent.parent)

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Writes none: they are in the run's config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        if not self._begun:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.resumed and step is not None:
                self._drop_lines_from(step)
            elif not self.resumed:
                renamed_aside(self.path)
            self._begun = True
        line = {"step": step, "time": round(time.time(), 3)}
        line |= {name: _finite(value) for name, value in metrics.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _drop_lines_from(self, step: int) -> None:
        if not self.path.is_file():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines(keepends=True):
            try:
                if line.endswith("\n") and json.loads(line)["step"] < step:
                    kept.append(line)
            except ValueError:  # cut off where the run was killed
                continue
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(kept), encoding="utf-8")
        partial.replace(self.path)


def _finite(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


class RunTensorBoardLogger(RunLog, TensorBoardLogger):
    """Writes event files to SAVE_DIR/NAME; a resumed run replaces the points from its first logged step on.

    Args:
        save_dir: the run's folder.
        name: folder in it.
    """

    def __init__(self, save_dir: str, name: str = "tensorboard") -> None:
        super().__init__(save_dir, name=name, version="")

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if self.resumed and step is not None:
            self._restart_at(step)
            self.resumed = False
        super().log_metrics(metrics, step)

    def _restart_at(self, step: int) -> None:
        """Tells TensorBoard to leave out what the earlier files have from this step on, as SummaryWriter's purge_step does."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        writer = self.experiment.file_writer
        assert writer is not None
        writer.add_event(Event(file_version="brain.Event:2"), step)
        writer.add_event(Event(session_log=SessionLog(status=SessionLog.START)), step)


class RunWandbLogger(RunLog, WandbLogger):
    """Logs to Weights & Biases (extra `wandb`); a resumed run goes on in the same run of W&B.

    Its id is kept in SAVE_DIR/wandb_id. W&B keeps the points that a resumed run computes again.

    Args:
        save_dir: the run's folder.
        project: of W&B.
        name: of the run in it; None lets W&B choose.
        entity: user or team; None takes that of the login.
        offline: write SAVE_DIR/wandb only, for `wandb sync`; no login, no network.
    """

    def __init__(
        self,
        save_dir: str,
        project: str = "sdxs",
        name: str | None = None,
        entity: str | None = None,
        offline: bool = False,
    ) -> None:
        super().__init__(name=name, save_dir=save_dir, project=project, offline=offline, entity=entity)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run of W&B."""
        if self._experiment is None:
            self._wandb_init["id"] = self._id = self._run_id()
        return super().experiment

    def _run_id(self) -> str:
        path = Path(str(self.save_dir), "wandb_id")
        if self.resumed and path.is_file():
            return path.read_text().strip()
        path.parent.mkdir(parents=True, exist_ok=True)
        new = os.urandom(4).hex()
        path.write_text(new + "\n")
        return new
