"""How long a checkpoint stops training: `python -m evaluation.benchmarks.checkpoint_stall --out FILE.json`."""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader

from evaluation.reports.result_file import write_result
from sdxs_lightning.callbacks.checkpointing import Checkpointing
from sdxs_lightning.callbacks.nan_guard import NanGuard
from sdxs_lightning.command_line import Option, run_command

WIDTH = 512
BYTES_PER_WEIGHT = 16
"""Weight, average and AdamW's two moments, float32."""


@dataclass(frozen=True, kw_only=True)
class StallOptions:
    """Compares how long asynchronous and synchronous checkpoints stop the training thread.

    A stage with weights, their average and AdamW trains on the CPU, once with each kind of checkpoint per repeat. Stored are
    ratios of one run: the time in which a save stops the training thread, against the median of the synchronous saves.
    """

    EXAMPLES: ClassVar[str] = (
        "python -m evaluation.benchmarks.checkpoint_stall --out evaluation/results/checkpoint_stall.json"
    )

    out: Annotated[Path | None, Option(metavar="FILE.json")] = None
    """Result."""
    folder: Annotated[Path | None, Option(metavar="DIR")] = None
    """Where checkpoints are written (and removed); default: the system's folder for temporary files."""
    megabytes: Annotated[int, Option(at_least=1)] = 200
    """Size of the state."""
    saves: Annotated[int, Option(at_least=2)] = 4
    """Checkpoints of a run."""
    repeats: Annotated[int, Option(at_least=1)] = 3
    """Runs of each kind."""


class Averaged(pl.LightningModule):
    """A network of many matrices, with an average of its weights."""

    def __init__(self, megabytes: int) -> None:
        super().__init__()
        layers = max(1, megabytes * 10**6 // (BYTES_PER_WEIGHT * WIDTH * WIDTH))
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers))
        self.average = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers))
        self.average.requires_grad_(False)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        for layer in self.layers:
            batch = batch + torch.tanh(layer(batch))
        return batch.square().mean()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.layers.parameters()), 0.1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.layers.parameters(), lr=1e-4)


class TimedCheckpointing(Checkpointing):
    """Records how long each save stops training."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.stalls: list[float] = []

    def save(self, trainer: pl.Trainer) -> Path:
        """Saves; `WaitBeforeSave` has waited for the checkpoint before."""
        start = time.perf_counter()
        folder = super().save(trainer)
        self.stalls.append(time.perf_counter() - start)
        return folder


class WaitBeforeSave(Callback):
    """Waits for the checkpoint in flight before the batch that ends with the next save."""

    def __init__(self, saver: TimedCheckpointing, every: int) -> None:
        self.saver, self.every = saver, every

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % self.every == 0:
            self.saver.finish(trainer)


def stalls(folder: Path, options: StallOptions, asynchronous: bool) -> list[float]:
    """Seconds for which each save of a run stops training."""
    every = 3
    saver = TimedCheckpointing(
        every_n_student_updates=every, keep=1, folder=str(folder), asynchronous=asynchronous
    )
    steps = every * options.saves
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[WaitBeforeSave(saver, every), NanGuard(read_every_n_batches=steps + 1), saver],
    )
    data: DataLoader[Tensor] = DataLoader(torch.randn(steps, WIDTH), batch_size=1)  # type: ignore[arg-type]
    trainer.fit(Averaged(options.megabytes), data)
    shutil.rmtree(folder)
    return saver.stalls[: options.saves]


def measure(options: StallOptions) -> dict[str, Any]:
    """Runs both kinds in turn."""
    times: dict[bool, list[list[float]]] = {False: [], True: []}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for repeat in range(options.repeats):
            for asynchronous in times:
                times[asynchronous].append(stalls(Path(folder) / f"{repeat}", options, asynchronous))
    whole = statistics.median(seconds for run in times[False] for seconds in run)
    later = sorted(seconds / whole for run in times[True] for seconds in run[1:])
    return {
        "megabytes": options.megabytes,
        "saves": sum(map(len, times[True])),
        "stall_of_first_save": round(statistics.median(run[0] for run in times[True]) / whole, 4),
        "stall_of_later_saves": round(statistics.median(later), 4),
        "stall_of_slowest_later_save": round(later[-1], 4),
        "goal": 0.1,
        "cores": os.cpu_count(),
    }


def run(options: StallOptions) -> str:
    """Measures, and writes the file."""
    result = measure(options)
    if options.out is not None:
        write_result(options.out, result)
    return "\n".join(f"{name}: {value}" for name, value in result.items())


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    run_command("python -m evaluation.benchmarks.checkpoint_stall", StallOptions, run, arguments)


if __name__ == "__main__":
    main()
