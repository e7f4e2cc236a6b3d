"""Ends a run cleanly: a checkpoint after SIGTERM, SIGUSR1 or Ctrl-C, and no endless wait for a lost rank."""

import signal
import sys
from types import FrameType
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerStatus

from sdxs_lightning.callbacks.checkpointing import Checkpointing
from sdxs_lightning.callbacks.counts import counts_of
from sdxs_lightning.callbacks.rank_monitor import RankMonitor
from sdxs_lightning.callbacks.ranks import Ranks
from sdxs_lightning.core.child_process import SIGNALS
from sdxs_lightning.core.errors import Interrupted


class Interruption(Checkpoint):
    """Saves a checkpoint and stops after a signal, between two iterations and on all ranks at the same batch.

    The handlers only set a flag. Lightning's own handlers are disabled: they save or broadcast inside the handler, possibly in
    the middle of an update or another collective, and requeue under SLURM. A second Ctrl-C stops at once, without saving.
    Derives from Lightning's `Checkpoint` to run after the other callbacks.

    Args:
        agree_every_n_batches: with several processes, how often they check over the host network whether one of them
            received a signal. All ranks check at the same batches, so all stop at the same one.
        rank_timeout_seconds: time without heartbeats of a rank after which the others report it and end with exit code 5.
            Heartbeats come from a separate thread, so they continue during long evaluations and saves.

    Raises:
        ValueError: unless agree_every_n_batches is at least 1 and rank_timeout_seconds is positive.
    """

    def __init__(self, agree_every_n_batches: int = 10, rank_timeout_seconds: float = 120.0) -> None:
        if agree_every_n_batches < 1:
            raise ValueError(
                f"Interruption.agree_every_n_batches must be 1 or more, got {agree_every_n_batches}."
            )
        if rank_timeout_seconds <= 0:
            raise ValueError(
                f"Interruption.rank_timeout_seconds must be positive, got {rank_timeout_seconds}."
            )
        self.monitor = RankMonitor(rank_timeout_seconds)
        self.agree_every_n_batches = agree_every_n_batches
        self.ranks = Ranks()
        self._signal = 0
        self._agreed = 0
        self._batches = 0
        self._before: dict[signal.Signals, Any] = {}

    def install(self, trainer: pl.Trainer) -> None:
        """Installs the signal handlers. Called before anything slow, such as indexing. Idempotent."""
        if self._before:
            return
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._remember)
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        # Lightning broadcasts its own flag and reads it back on every batch, which synchronises with the device.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

    def watch_ranks(self, trainer: pl.Trainer) -> None:
        """Starts the monitor. A collective, as soon as the ranks are connected. Idempotent."""
        self.monitor.start(self.ranks, lambda: trainer.state.status == TrainerStatus.INTERRUPTED)

    def restore(self) -> None:
        """Restores the previous signal handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = number
        again = " (again to stop at once, without it)" if number == signal.SIGINT else ""
        sys.stderr.write(
            f"\n{signal.Signals(number).name}: stopping after a checkpoint at the next step boundary{again}\n"
        )

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Stops if a signal arrived while the data was prepared.

        Raises:
            Interrupted: on all ranks.
        """
        self.install(trainer)
        self.watch_ranks(trainer)
        self._stop_before_training()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stops if a signal arrived while the networks were loaded.

        Raises:
            Interrupted: on all ranks.
        """
        self._stop_before_training()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stops if a signal arrived during the other callbacks' evaluation at the start.

        Raises:
            Interrupted: on all ranks.
        """
        self._stop_before_training()

    def _stop_before_training(self) -> None:
        number = self.ranks.highest(self._signal)
        if number:
            raise Interrupted(
                f"stopped by {signal.Signals(number).name} before the first update of this start, so there was nothing to "
                "save; run the same command again",
                number,
            )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Checks for a signal every n batches; after one, saves and stops between iterations.

        Raises:
            Interrupted: on all ranks.
        """
        self._batches += 1
        if self._agreed == 0 and (self.ranks.count == 1 or self._batches % self.agree_every_n_batches == 0):
            self._agreed = self.ranks.highest(self._signal)
        if self._agreed and counts_of(trainer).between_iterations:
            self._stop(trainer)

    def _stop(self, trainer: pl.Trainer) -> None:
        name = signal.Signals(self._agreed).name
        updates = counts_of(trainer).updates
        saver = next((one for one in trainer.checkpoint_callbacks if isinstance(one, Checkpointing)), None)
        if saver is None:
            saved = "nothing was saved, because the run has no Checkpointing callback"
        else:
            # A regular checkpoint of this student update suffices: a resumed run repeats the few iterations since, bit for
            # bit, and a second save could exceed the scheduler's grace period.
            folder = saver.saved_at(trainer, updates) or saver.save(trainer)
            saver.finish(trainer)
            saved = (
                f"checkpoint saved in {folder}; resume with the same command and --ckpt_path auto (or last)"
            )
        raise Interrupted(f"stopped by {name} after student update {updates}: {saved}", self._agreed)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restores the handlers, since nothing is left to save."""
        self.restore()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self.restore()
        self.monitor.stop(exception)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Reports this rank as done to the other ranks' monitors."""
        self.monitor.stop()
