"""Throughput logging and progress bar for all stages."""

from __future__ import annotations

import resource
import sys
import time
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ProgressBar as LightningProgressBar
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from evaluation.callbacks.student_updates import log_now, paused_seconds
from sdxs_lightning.callbacks.counts import counts_of
from sdxs_lightning.stages.distillation.step import OneStepDistillation


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this process: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident / (2**30 if sys.platform == "darwin" else 2**20)  # macOS counts bytes, Linux KiB


class Throughput(pl.Callback):
    """Logs images/s over all ranks, student updates/s and peak memory; excludes the time of metrics.

    Stages without a student-update counter count optimizer steps.

    Args:
        every_n_batches: logging interval; the device is synchronised only then.
    """

    def __init__(self, every_n_batches: int = 50) -> None:
        self.every_n_batches = every_n_batches
        self.latest: dict[str, float] = {}
        """The last values logged."""
        self._images = self._batches = self._updates = 0
        self._start = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._images += len(batch)
        self._batches += 1
        if self._batches < self.every_n_batches:
            return
        device = pl_module.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = self._now(trainer) - self._start
        self.latest = {
            "throughput/images_per_second": self._images * trainer.world_size / seconds,
            "throughput/student_updates_per_second": (counts_of(trainer).updates - self._updates) / seconds,
            "throughput/peak_memory_gib": peak_memory_gib(device),
        }
        log_now(trainer, self.latest)
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in self.latest.items()})
        self._begin(trainer)

    def _begin(self, trainer: pl.Trainer) -> None:
        self._images = self._batches = 0
        self._updates, self._start = counts_of(trainer).updates, self._now(trainer)

    @staticmethod
    def _now(trainer: pl.Trainer) -> float:
        return time.perf_counter() - paused_seconds(trainer)


SHOWN = {
    "student/distribution_matching": "student {:.3f}",
    "student/regression": "regression {:.4f}",
    "student/output": "output {:.4f}",
    "student/features": "features {:.4f}",
    "student/task": "task {:.4f}",
    "student/reconstruction_loss": "reconstruction {:.4f}",
    "fake_score/loss": "fake score {:.3f}",
    "discriminator/loss": "discriminator {:.3f}",
    "val/fid": "FID {:.1f}",
    "val/caption_accuracy": "caption accuracy {:.0%}",
    "throughput/images_per_second": "{:.0f} images/s",
}
"""Format per metric; metrics that were not logged are omitted."""


class ProgressBar(LightningProgressBar):
    """Progress in student updates with the most important metrics; prints lines at intervals without a terminal.

    Args:
        line_seconds: interval of the lines without a terminal.
    """

    def __init__(self, line_seconds: float = 15.0) -> None:
        super().__init__()
        self.line_seconds = line_seconds
        self._enabled = True
        self._console = Console()
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._numbers = ""
        self._total: int | None = None
        self._first_update = 0
        self._start = self._last_line = 0.0

    def disable(self) -> None:
        """Hides the bar; called by Lightning on all ranks but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Shows the bar."""
        self._enabled = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._total = _planned_updates(trainer, pl_module)
        self._first_update = counts_of(trainer).updates
        self._start = self._last_line = time.monotonic()
        if not self._enabled or not self._console.is_terminal:
            return
        columns = (
            TextColumn("student updates"),
            BarColumn(20),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
        )
        self._progress = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self._console)
        self._task = self._progress.add_task("", total=self._total, completed=self._first_update)
        self._progress.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Reads metrics only after they were logged, because reading synchronises the device."""
        if not self._enabled:
            return
        if (batch_idx + 1) % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._numbers = self._read(trainer)
        updates = counts_of(trainer).updates
        if self._progress is not None:
            self._progress.update(self._task, completed=updates, description=self._numbers)
        elif time.monotonic() - self._last_line > self.line_seconds:
            self._last_line = time.monotonic()
            self.print(
                f"student updates {updates}/{self._total or '?'}  {self._numbers}  {self._times(updates)}"
            )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Releases the terminal before the message is printed."""
        self._stop()

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Prints above the bar."""
        if self._enabled:
            console = self._progress.console if self._progress is not None else self._console
            console.print(*args, soft_wrap=True, highlight=False, markup=False)

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _read(self, trainer: pl.Trainer) -> str:
        metrics = trainer.callback_metrics
        return "  ".join(text.format(float(metrics[name])) for name, text in SHOWN.items() if name in metrics)

    def _times(self, updates: int) -> str:
        elapsed = time.monotonic() - self._start
        done = updates - self._first_update
        if not done or self._total is None:
            return f"{timedelta(seconds=round(elapsed))}"
        left = elapsed * (self._total - updates) / done
        return f"{timedelta(seconds=round(elapsed))}, {timedelta(seconds=round(left))} left"


def _planned_updates(trainer: pl.Trainer, module: pl.LightningModule) -> int | None:
    """Number of updates after which the run ends, if limited."""
    if isinstance(module, OneStepDistillation):
        return module.update_schedule.max_student_updates
    if isinstance(limit := getattr(module, "max_student_updates", None), int):
        return limit
    return trainer.max_steps if trainer.max_steps >= 0 else None
