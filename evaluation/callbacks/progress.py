"""Throughput logging and progress bar for all stages."""

from __future__ import annotations

import socket
import time
from datetime import timedelta
from typing import Any, NamedTuple

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
)

from evaluation.callbacks.step_flops import StepFlops, peak_tflops
from evaluation.callbacks.step_timing import FetchTimer, Mark, Span, Stopwatch, TimedCollectives
from evaluation.callbacks.student_updates import log_now, paused_seconds
from evaluation.runner.memory import peak_resident_bytes
from sdxs_lightning.callbacks.counts import counts_of
from sdxs_lightning.callbacks.ranks import Ranks
from sdxs_lightning.stages.distillation.step import OneStepDistillation

COLLECTIVE = "collective"


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this process: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return peak_resident_bytes() / 2**30


class Window(NamedTuple):
    """What one rank measured since the last log point."""

    host: str
    peak_memory_gib: float
    data_wait: float
    """Milliseconds per iteration."""
    iterations: dict[str, float]
    """Milliseconds per iteration, by kind."""
    iteration: float
    """Milliseconds per iteration, of all kinds."""
    collectives: float
    """Milliseconds per iteration."""

    @property
    def own(self) -> float:
        """Milliseconds per iteration in which this rank does not wait for others: they end an iteration together."""
        return self.data_wait + self.iteration - self.collectives


class Throughput(pl.Callback):
    """Logs speed, where the time of an iteration goes, memory, and the slowest rank; excludes the time of metrics.

    Images/s and student updates/s are over all ranks; stages without a student-update counter count optimizer steps. TFLOP/s
    and MFU are rank 0's, left out while its operations are being counted (see `StepFlops`). An iteration is one with all
    its micro-batches and updates, by kind, on the rank where it takes longest; so is the wait for data. Time in collectives is
    that of the rank that spends least in them, `ranks/waiting_ms` how much more the others do: they wait for the slowest, which
    is the rank with most time of its own. Under FSDP2 collectives overlap with computation; those of DDP's own reducer, in
    stages of one network, are not seen. The manual of the configurations lists the names.

    Args:
        every_n_batches: logging interval; the device is synchronised, and the ranks compared, only then.
        count_flops: false leaves out TFLOP/s and MFU.
        peak_tflops: peak of a device for MFU; None takes it from a table of GPUs, for bfloat16 and float16.
    """

    def __init__(
        self, every_n_batches: int = 50, count_flops: bool = True, peak_tflops: float | None = None
    ) -> None:
        if every_n_batches < 1:
            raise ValueError(f"Throughput.every_n_batches must be 1 or more, got {every_n_batches}.")
        if peak_tflops is not None and peak_tflops <= 0:
            raise ValueError(f"Throughput.peak_tflops must be positive, got {peak_tflops}.")
        self.every_n_batches = every_n_batches
        self.peak_tflops = peak_tflops
        self.latest: dict[str, float] = {}
        """The last numbers logged."""
        self._flops = StepFlops() if count_flops else None
        self._ranks = Ranks()
        self._images = self._batches = self._updates = self._ordinary = self._operations = 0
        self._start = 0.0
        self._step: tuple[str, Mark] | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._watch = Stopwatch(pl_module.device)
        self._collectives = TimedCollectives(self._watch, COLLECTIVE)
        self._fetches = FetchTimer(trainer)
        if self._ranks.count > 1:
            self._collectives.install()
            self._ranks.wait()  # here all are together to make its group
        if self.peak_tflops is None:
            self.peak_tflops = peak_tflops(pl_module.device, str(trainer.precision))
        self._begin(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        name, variant = getattr(pl_module, "iteration_kind", ("", 0))
        shapes = tuple(
            one.shape for one in getattr(batch, "__dict__", {}).values() if isinstance(one, torch.Tensor)
        )
        kind = f"{name} {variant} {[tuple(shape) for shape in shapes]}"
        ordinary = self._flops is None or self._flops.begin(kind, pl_module)
        self._collectives.on = ordinary
        self._step = (name, self._watch.mark()) if ordinary else None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._collectives.on = False
        if self._step is not None:
            name, start = self._step
            self._watch.add(name, start, self._watch.mark())
            self._ordinary += 1
        if self._flops is not None:
            self._operations += self._flops.end()
        self._images += len(batch)
        self._batches += 1
        if self._batches >= self.every_n_batches:
            self._log(trainer, pl_module)
            self._begin(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Leaves torch and the profiler as they were."""
        self._stop()

    def state_dict(self) -> dict[str, Any]:
        """What was counted: a counted step runs compiled blocks uncompiled, and a resumed run would count at other steps."""
        return {} if self._flops is None else {"operations": dict(self._flops.known)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._flops is not None:
            self._flops.known = dict(state_dict.get("operations", {}))

    def _stop(self) -> None:
        if hasattr(self, "_watch"):
            self._collectives.remove()
            self._fetches.remove()
        if self._flops is not None:
            self._flops.stop()

    def _log(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        micro_batches = getattr(module, "accumulate_grad_batches", trainer.accumulate_grad_batches)
        own = self._window(module.device, micro_batches)
        seconds = self._now(trainer) - self._start
        ranks = self._ranks.gathered(own)
        memory = [rank.peak_memory_gib for rank in ranks]
        numbers = {
            "throughput/images_per_second": self._images * trainer.world_size / seconds,
            "throughput/student_updates_per_second": (counts_of(trainer).updates - self._updates) / seconds,
            "throughput/peak_memory_gib": max(memory),
            "time/data_wait_ms": max(rank.data_wait for rank in ranks),
        }
        for name in own.iterations:
            longest = max(rank.iterations.get(name, 0.0) for rank in ranks)
            numbers[f"time/{name}_iteration_ms" if name else "time/iteration_ms"] = longest
        if self._operations and self._ordinary == self._batches:
            numbers["throughput/tflops_per_device"] = self._operations / seconds / 1e12
            if self.peak_tflops is not None:
                numbers["throughput/mfu"] = numbers["throughput/tflops_per_device"] / self.peak_tflops
        texts: dict[str, str] = {}
        if len(ranks) > 1:
            numbers["ranks/fullest"] = float(memory.index(max(memory)))
        if len(ranks) > 1 and own.iterations:
            waits = [rank.collectives for rank in ranks]
            slowest = max(range(len(ranks)), key=lambda rank: ranks[rank].own)
            numbers["ranks/slowest"] = float(slowest)
            texts["ranks/slowest_host"] = ranks[slowest].host
            if max(waits) > 0:
                numbers |= {"time/collectives_ms": min(waits), "ranks/waiting_ms": max(waits) - min(waits)}
        self.latest = numbers
        log_now(trainer, {**numbers, **texts})
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in numbers.items()})

    def _window(self, device: torch.device, micro_batches: int) -> Window:
        def per_iteration(seconds: float, batches: int) -> float:
            return 1000 * seconds / max(batches, 1) * micro_batches

        spans = self._watch.read()
        collectives = spans.pop(COLLECTIVE, Span(0.0, 0))
        return Window(
            host=socket.gethostname(),
            peak_memory_gib=peak_memory_gib(device),
            data_wait=per_iteration(self._fetches.read(), self._batches),
            iterations={name: per_iteration(span.seconds, span.number) for name, span in spans.items()},
            iteration=per_iteration(sum(span.seconds for span in spans.values()), self._ordinary),
            collectives=per_iteration(collectives.seconds, self._ordinary),
        )

    def _begin(self, trainer: pl.Trainer) -> None:
        self._images = self._batches = self._ordinary = self._operations = 0
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
        self._warmup_updates = 0
        self._since: tuple[int, float] | None = None
        """Updates and time at the end of the first iteration that updated the student, in the warm-up and anew after it: pairs
        are made before the one and the fake score's head start is before the other, and an update after it costs more."""

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
        self._warmup_updates = (
            pl_module.update_schedule.warmup_updates if isinstance(pl_module, OneStepDistillation) else 0
        )
        self._since = None
        if not self._enabled or not self._console.is_terminal:
            return
        columns = (
            TextColumn("student updates"),
            BarColumn(20),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
        )
        # rich's own column for the time left sees 30 s back, and one update of a full-size student takes longer.
        left = TextColumn("{task.fields[left]}")
        self._progress = Progress(*columns, TimeElapsedColumn(), left, console=self._console)
        self._task = self._progress.add_task("", total=self._total, completed=self._first_update, left="")
        self._progress.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Reads metrics only after they were logged, because reading synchronises the device."""
        if not self._enabled:
            return
        if (batch_idx + 1) % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._numbers = self._read(trainer, pl_module)
        updates = counts_of(trainer).updates
        if updates > self._first_update and (
            self._since is None or self._since[0] <= self._warmup_updates < updates
        ):
            self._since = updates, time.monotonic()
        if self._progress is not None:
            self._progress.update(
                self._task, completed=updates, description=self._numbers, left=self._left(updates)
            )
        elif time.monotonic() - self._last_line > self.line_seconds:
            self._last_line = time.monotonic()
            elapsed = timedelta(seconds=round(time.monotonic() - self._start))
            times = ", ".join(filter(None, [f"{elapsed}", self._left(updates)]))
            self.print(f"student updates {updates}/{self._total or '?'}  {self._numbers}  {times}")

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

    def _read(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> str:
        metrics = dict(trainer.callback_metrics)  # Lightning keeps each metric's last value
        if isinstance(pl_module, OneStepDistillation) and counts_of(trainer).updates > self._warmup_updates:
            for name in set(pl_module.terms.warmup) - set(pl_module.terms.distillation):
                metrics.pop(f"student/{name}", None)
        return "  ".join(text.format(float(metrics[name])) for name, text in SHOWN.items() if name in metrics)

    def _left(self, updates: int) -> str:
        """Time left, at the rate since the first update; empty before a second, or if the run has no end."""
        if self._since is None or self._total is None or updates == self._since[0]:
            return ""
        first, since = self._since
        left = (time.monotonic() - since) * (self._total - updates) / (updates - first)
        return f"{timedelta(seconds=round(left))} left"


def _planned_updates(trainer: pl.Trainer, module: pl.LightningModule) -> int | None:
    """Number of updates after which the run ends, if limited."""
    if isinstance(module, OneStepDistillation):
        return module.update_schedule.max_student_updates
    if isinstance(limit := getattr(module, "max_student_updates", None), int):
        return limit
    return trainer.max_steps if trainer.max_steps >= 0 else None
