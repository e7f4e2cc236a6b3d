"""Faults that a YAML file can order: a signal at a batch, a disk that is full from a batch on, death while saving."""

from __future__ import annotations

import io
import os
import resource
import signal
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from sdxs_lightning.callbacks.checkpointing import Checkpointing


class RaiseSignal(Callback):
    """Sends this process a signal while the batch of that number, counted from 1, is under way.

    Args:
        name: SIGTERM, SIGUSR1 or SIGINT.
        batch: which; 0 is before the training.
        rank: of which process.
        times: how often in a row.
        group: sends it to the whole process group, reading workers included, as SLURM does.
    """

    def __init__(self, name: str, batch: int, rank: int = 0, times: int = 1, group: bool = False) -> None:
        self.signal, self.batch, self.rank, self.times = signal.Signals[name], batch, rank, times
        self.group = group
        self.seen = 0
        if group:
            os.setpgid(0, 0)  # a group of its own: not the process that started this one

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Before the training: a batch of that number never comes."""
        if self.batch == 0 and trainer.global_rank == self.rank:
            signal.raise_signal(self.signal)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.seen += 1
        if self.seen == self.batch and trainer.global_rank == self.rank:
            for _ in range(self.times):
                if self.group:
                    os.killpg(0, self.signal)
                else:
                    signal.raise_signal(self.signal)


class FullDisk(Callback):
    """Lets no file grow beyond a size from the batch of that number on; the limit is lifted where training stops.

    What is being written before that batch is written to its end.

    Args:
        batch: counted from 1.
        limit_bytes: size of the largest file.
    """

    def __init__(self, batch: int, limit_bytes: int) -> None:
        self.batch, self.limit_bytes, self.seen = batch, limit_bytes, 0

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.seen += 1
        if self.seen == self.batch:
            for one in trainer.checkpoint_callbacks:
                if isinstance(one, Checkpointing):
                    one.finish(trainer)
            self._limit(self.limit_bytes)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._limit(resource.RLIM_INFINITY)

    @staticmethod
    def _limit(size: int) -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard if size == resource.RLIM_INFINITY else size, hard))


class KillOnce(Callback):
    """Kills the process of one rank at a batch, the first time only.

    Args:
        batch: counted from 1.
        rank: of which process.
        mark: file that says that it has happened.
    """

    def __init__(self, batch: int, rank: int, mark: str) -> None:
        self.batch, self.rank, self.mark, self.seen = batch, rank, Path(mark), 0

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.seen += 1
        if self.seen == self.batch and trainer.global_rank == self.rank and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)


class KillWhileSaving(Callback):
    """Kills the process when half of a checkpoint's file is written.

    Args:
        save: which checkpoint, counted from 1.
    """

    def __init__(self, save: int) -> None:
        self.save, self.seen = save, 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        torch_save = torch.save

        def save(contents: Any, file: Any) -> None:
            self.seen += 1
            if self.seen < self.save:
                torch_save(contents, file)
                return
            stream = io.BytesIO()
            torch_save(contents, stream)
            file.write(stream.getvalue()[: stream.tell() // 2])
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

        torch.save = save  # type: ignore[assignment]
