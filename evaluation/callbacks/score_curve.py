"""Scores of the averaged student during training, under any protocol."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from evaluation.callbacks.independence import require_independent
from evaluation.callbacks.student_updates import (
    StudentUpdateCallback,
    log_now,
    paused_seconds,
    release_gpu,
    vae_on_device,
)
from sdxs_lightning.stages.distillation.step import OneStepDistillation

SCORES = "scores.jsonl"
"""File in the run's folder with one line per measurement."""


class ScoreCurve(StudentUpdateCallback):
    """Scores of the averaged student every n student updates.

    They are logged as `val/...`, where checkpoints can monitor them, and appended to `scores.jsonl` in the run's folder with
    the protocol's name and hash. `history` is saved in checkpoints, the metric networks are not.

    Args:
        every_n_student_updates: measuring interval.
        at_start: also before the first update.
    """

    decodes_images = True
    """Tells the memory plan that the VAE is on the device."""

    def __init__(self, every_n_student_updates: int, at_start: bool = True) -> None:
        super().__init__(every_n_student_updates, at_start)
        self.history: list[dict[str, float]] = []
        """One entry per measurement: `student_updates`, `seconds` of wall clock since the start of training, `training_seconds`
        without the time of metrics, and the scores."""
        self._trainer: pl.Trainer | None = None
        self._start_seconds = self._earlier_seconds = self._earlier_training_seconds = 0.0

    def scores_of(self, trainer: pl.Trainer, module: OneStepDistillation) -> dict[str, float]:
        """Measure the scores; called on all ranks, with equal results."""
        raise NotImplementedError

    def protocol_id(self) -> dict[str, Any]:
        """`protocol` and `hash`, stored beside the scores."""
        raise NotImplementedError

    def networks(self) -> list[Any]:
        """Metric networks on the device; each has `to`."""
        raise NotImplementedError

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Checks that no metric network is used in training.

        Raises:
            UserError: as in `require_independent`.
        """
        assert isinstance(pl_module, OneStepDistillation)
        require_independent(self.networks(), pl_module.frozen_image_networks())

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start_seconds, self._trainer = time.perf_counter(), trainer
        for logger in trainer.loggers:
            if trainer.is_global_zero and isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("val/protocol", json.dumps(self.protocol_id()))
        super().on_train_start(trainer, pl_module)

    def at_student_update(self, trainer: pl.Trainer, module: OneStepDistillation) -> None:
        clock = self._clock()  # before measuring: the time of the scores
        with vae_on_device(module):
            try:
                scores = self.scores_of(trainer, module)
            finally:
                release_gpu(self.networks(), module.device)
        self.history.append({"student_updates": module.student_updates, **clock, **scores})
        named = {f"val/{name}": value for name, value in scores.items()}
        log_now(trainer, named)
        # Monitored by ModelCheckpoint, shown by the progress bar.
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in named.items()})
        if trainer.is_global_zero:
            folder = Path(trainer.default_root_dir)
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / SCORES).open("a") as file:
                file.write(json.dumps({**self.history[-1], **self.protocol_id()}) + "\n")

    def state_dict(self) -> dict[str, Any]:
        """State of the curve, which continues after a resume without the time between the runs."""
        return {**super().state_dict(), "history": self.history, "clock": self._clock()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.history = list(state_dict["history"])
        self._earlier_seconds = state_dict["clock"]["seconds"]
        self._earlier_training_seconds = state_dict["clock"]["training_seconds"]

    def _clock(self) -> dict[str, float]:
        wall = measuring = 0.0
        if self._trainer is not None:
            wall, measuring = time.perf_counter() - self._start_seconds, paused_seconds(self._trainer)
        return {
            "seconds": self._earlier_seconds + wall,
            "training_seconds": self._earlier_training_seconds + wall - measuring,
        }
