"""Atomic checkpoints every n student updates, written while training continues."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from sdxs_lightning.callbacks import checkpoint_folder as folders
from sdxs_lightning.callbacks.checkpoint_staging import Rounding, Staging
from sdxs_lightning.callbacks.checkpoint_writer import CheckpointWriter, Snapshot
from sdxs_lightning.callbacks.counts import counts_of
from sdxs_lightning.callbacks.nan_guard import diverged, read_guards
from sdxs_lightning.callbacks.optimizer_settings import settings_of
from sdxs_lightning.callbacks.ranks import Ranks
from sdxs_lightning.callbacks.resume import KEY, Resume
from sdxs_lightning.callbacks.run_folder import unshared
from sdxs_lightning.core.disk_room import free_bytes
from sdxs_lightning.core.errors import CheckpointNotWritten, UserError
from sdxs_lightning.memory_plan.checkpoint_bytes import averaged_names, checkpoint_bytes
from sdxs_lightning.training.plannable import Plannable

POLL_BATCHES = 10
"""Interval at which several ranks ask each other whether the checkpoint in flight is written."""


class Checkpointing(Checkpoint):
    """Saves atomically every n student updates and at the end, and keeps the newest checkpoints.

    Saves only between iterations, since checkpoints do not hold accumulated gradients. Lightning runs callbacks that derive
    from its `Checkpoint` after all others, so the saved callback states belong to the same batch.

    An asynchronous checkpoint is copied to host memory (page-locked for a CUDA device) and written by a thread while training
    continues. At most one is being written: the next save, a signal, the end of the run and the report of an error wait for it.
    Until its manifest is there it is not complete, and no resume takes it.

    Args:
        every_n_student_updates: interval between checkpoints.
        keep: number of complete checkpoints to keep; older ones are removed once a newer one is complete. The disk needs room
            for one more.
        folder: folder of the checkpoints; None is `checkpoints` in the run's folder (`trainer.default_root_dir`).
        start_over: what to do with checkpoints of an earlier run if this one does not resume one of them: False raises,
            True removes them.
        asynchronous: whether training continues while a checkpoint is written, which holds one checkpoint in host memory (of
            rank 0; with FSDP2 each rank's shard). False stops training until it is written.
        averages_in_bfloat16: whether the average of the weights and the optimizers' moments are saved as bfloat16: 18 instead
            of 28 bytes per student parameter in distillation. A resumed run then no longer equals the uninterrupted one bit
            for bit; it continues from averages and moments that are rounded to 8 bits (2 digits).

    Raises:
        ValueError: unless every_n_student_updates and keep are at least 1.
    """

    checkpoints_in = "checkpoints"
    """Default folder in the run's folder."""

    def __init__(
        self,
        every_n_student_updates: int = 500,
        keep: int = 2,
        folder: str | None = None,
        start_over: bool = False,
        asynchronous: bool = True,
        averages_in_bfloat16: bool = False,
    ) -> None:
        for name, value in (("every_n_student_updates", every_n_student_updates), ("keep", keep)):
            if value < 1:
                raise ValueError(f"Checkpointing.{name} must be 1 or more, got {value}.")
        self.every_n_student_updates = every_n_student_updates
        self.keep = keep
        self.folder = folder
        self.start_over = start_over
        self.asynchronous, self.averages_in_bfloat16 = asynchronous, averages_in_bfloat16
        self.ranks = Ranks()
        self._writer, self._staging, self._rounding = CheckpointWriter(keep), Staging(), Rounding()
        self._in_flight: Snapshot | None = None
        self._batches_in_flight = 0
        self._saved_updates = 0
        self._saved_name: str | None = None
        self._starts = 1
        self.resume: Resume | None = None
        """Adds the run's description to checkpoints; set by the command line, which knows the configuration, or in `setup`."""

    def run_folder(self, trainer: pl.Trainer) -> Path:
        """Returns the folder of this run's checkpoints."""
        return Path(self.folder or Path(trainer.default_root_dir) / self.checkpoints_in)

    def saved_at(self, trainer: pl.Trainer, student_updates: int) -> Path | None:
        """The checkpoint of this student update if this process wrote it last or resumed from it, else None."""
        if self._saved_name is None or self._saved_updates != student_updates:
            return None
        return self.run_folder(trainer) / self._saved_name

    def last_good(self, trainer: pl.Trainer) -> str:
        """Names the newest complete checkpoint, for error messages; waits for the one in flight."""
        self._writer.wait()
        newest = folders.newest_complete_checkpoint(self.run_folder(trainer))
        return f"the last good checkpoint is {newest}" if newest else "there is no checkpoint yet"

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Checks before training that checkpoints can be written.

        Raises:
            UserError: on all ranks, if they cannot.
        """
        if self.resume is None and self in trainer.checkpoint_callbacks:
            self.resume = Resume(trainer, {}, newest=False)
        folder = self.run_folder(trainer)
        self._refuse_together(self._unwritable(folder) if self.ranks.first else None)
        self._refuse_together(unshared(folder, self.ranks))
        self._writer.connect()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keeps this run's checkpoints apart from an earlier run's.

        Raises:
            UserError: on all ranks, if the folder holds checkpoints of an earlier run, or the disk has no room for one.
        """
        self.refuse_earlier_run(trainer)
        if self.start_over and self.ranks.first and not self._resumes_here(trainer):
            folders.keep_newest(self.run_folder(trainer), 0)
        # A checkpoint that was resumed from is not saved again.
        self._saved_updates = counts_of(trainer).updates
        self._saved_name = self.ranks.of_first(self._resumed_name(trainer) if self.ranks.first else None)
        if isinstance(pl_module, Plannable):
            if self.averages_in_bfloat16:
                self._rounding = Rounding(averaged_names(pl_module, pl_module.plan_networks()))
            self._refuse_together(self._no_room(trainer) if self.ranks.first else None)
        if self.resume is not None and self.resume.settings is None:
            self.resume.settings = settings_of(trainer)
        if self.ranks.first:
            self._starts = folders.next_start(self.run_folder(trainer))

    def refuse_earlier_run(self, trainer: pl.Trainer) -> None:
        """Checks that the folder's checkpoints are this run's. A collective.

        Raises:
            UserError: on all ranks, if they are an earlier run's and `start_over` is false.
        """
        self._refuse_together(self._in_the_way(trainer) if self.ranks.first else None)

    def _refuse_together(self, problem: str | None) -> None:
        problem = self.ranks.first_message(problem)
        if problem:
            raise UserError(problem)

    @staticmethod
    def _unwritable(folder: Path) -> str | None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return None
        except OSError as error:
            return (
                f"checkpoints cannot be written to '{folder}' ({folders.write_failure(error)}); give a folder that can be "
                "written as --trainer.default_root_dir, or change its permissions."
            )

    def _in_the_way(self, trainer: pl.Trainer) -> str | None:
        folder = self.run_folder(trainer)
        earlier = folders.complete_checkpoints(folder)
        if not earlier or self.start_over or self._resumes_here(trainer):
            return None
        elsewhere = (
            "" if trainer.ckpt_path is None else f", and --ckpt_path '{trainer.ckpt_path}' is not one of them"
        )
        return (
            f"'{folder}' holds checkpoints of an earlier run (newest: {earlier[-1].name}){elsewhere}; resume it with "
            "--ckpt_path auto or last, choose another --trainer.default_root_dir, or remove them by start_over: true of "
            "Checkpointing."
        )

    def _resumes_here(self, trainer: pl.Trainer) -> bool:
        """Whether this run resumes from a checkpoint in its own folder."""
        if trainer.ckpt_path is None:
            return False
        own = (self.run_folder(trainer), Path(trainer.default_root_dir))
        return any(Path(trainer.ckpt_path).resolve().is_relative_to(folder.resolve()) for folder in own)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves every n student updates; ends the run if the checkpoint in flight could not be written."""
        self._poll(trainer)
        counts, n = counts_of(trainer), self.every_n_student_updates
        if counts.between_iterations and counts.updates // n > self._saved_updates // n:
            self.save(trainer)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Adds the entry that a resumed run is compared with."""
        if self.resume is not None:
            checkpoint[KEY] = self.resume.entry()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves the final state."""
        self.save(trainer)
        self.finish(trainer)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Lets the checkpoint in flight be completed: it was taken before the error."""
        self._writer.wait()

    def save(self, trainer: pl.Trainer) -> Path:
        """Takes a checkpoint now; if asynchronous, it is complete after `finish`. Waits for the one in flight.

        A collective: all ranks must call it, between iterations.

        Returns:
            The checkpoint's folder.

        Raises:
            TrainingDiverged: if a loss is not finite, or the weights of the checkpoint in flight or of this one; those of an
                asynchronous one are checked while it is written.
            CheckpointNotWritten: on all ranks, if any rank could not write; the previous checkpoint is untouched.
        """
        counts = counts_of(trainer)
        name = folders.checkpoint_name(counts.updates, counts.batches)
        folder = self.run_folder(trainer) / name
        if name == self._saved_name:
            return folder
        self.finish(trainer)
        guarded = read_guards(trainer)
        sharded = _is_sharded(trainer)
        # Not trainer.save_checkpoint, which writes before it returns, and whose barrier leaves the other ranks waiting if a
        # rank cannot write.
        contents = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        if self.asynchronous and (sharded or self.ranks.first):
            contents = self._staging.copy(contents, self._rounding)
        elif self.averages_in_bfloat16:
            contents = self._rounding.rounded(contents)
        self._in_flight, self._batches_in_flight = (
            Snapshot(contents, folder, counts, self._starts, sharded, guarded),
            0,
        )
        if self.asynchronous:
            self._writer.start(self._in_flight, self._staging.wait)
        else:
            self._writer.write(self._in_flight)
            self.finish(trainer)
        self._saved_updates, self._saved_name = counts.updates, name
        return folder

    def finish(self, trainer: pl.Trainer) -> None:
        """Waits until the checkpoint in flight is complete. A collective.

        Raises:
            TrainingDiverged: on all ranks, if its weights are not finite.
            CheckpointNotWritten: on all ranks, if any rank could not write; the previous checkpoint is untouched.
        """
        if self._in_flight is None:
            return
        reports = self.ranks.gathered((self._writer.result(), self._writer.bad_networks))
        folder, updates, self._in_flight = self._in_flight.folder, self._in_flight.counts.updates, None
        bad = next((names for _, names in reports if names), None)
        if bad:
            weights = f"weights of the {', '.join(bad)} are NaN or infinite at student update {updates}"
            raise diverged(trainer, weights)
        problem = next((reason for reason, _ in reports if reason), None)
        if problem:
            self._give_up(trainer, folder, updates, problem)
        size = self._writer.size / 1e6
        rank_zero_info(f"Checkpoint of student update {updates}: {folder} ({size:.1f} MB)")

    def _poll(self, trainer: pl.Trainer) -> None:
        """Finishes the checkpoint in flight if it is written; several ranks agree on that every few batches."""
        if self._in_flight is None:
            return
        self._batches_in_flight += 1
        if self.ranks.count > 1 and self._batches_in_flight % POLL_BATCHES:
            return
        if not self.ranks.highest(int(self._writer.busy)):
            self.finish(trainer)

    def _resumed_name(self, trainer: pl.Trainer) -> str | None:
        """The name of the checkpoint that was resumed from, if it is the newest of this folder."""
        path = None if self.resume is None else self.resume.path
        newest = folders.newest_complete_checkpoint(self.run_folder(trainer))
        same = path is not None and newest is not None and path.parent.resolve() == newest.resolve()
        return newest.name if same and newest is not None else None

    def _no_room(self, trainer: pl.Trainer) -> str | None:
        """Why the disk has no room for one checkpoint; warns if it has none for `keep` and one more."""
        folder = self.run_folder(trainer)
        size = checkpoint_bytes(trainer.lightning_module).stored(self.averages_in_bfloat16)
        free, there = free_bytes(folder), len(folders.complete_checkpoints(folder))
        missing = max(self.keep + 1 - there, 1) * size
        if not 0 <= free < missing:
            return None
        room = f"'{folder}' has {free / 1e9:.2f} GB free"
        way = "make room, lower Checkpointing.keep, or give another --trainer.default_root_dir"
        if free < size:
            return f"{room}, and one checkpoint has {size / 1e9:.2f} GB; {way}."
        rank_zero_warn(
            f"{room}, and checkpoints will need {missing / 1e9:.2f} GB more (keep {self.keep} and one that is being written, "
            f"{size / 1e9:.2f} GB each); {way}."
        )
        return None

    def _give_up(self, trainer: pl.Trainer, folder: Path, student_updates: int, problem: str) -> None:
        if self.ranks.first:  # no rank still writes: each has given its result
            shutil.rmtree(folders.partial_of(folder), ignore_errors=True)
        free = ""
        if self.ranks.first and folder.parent.is_dir():
            free = f", {shutil.disk_usage(folder.parent).free / 1e6:.0f} MB are free"
        raise CheckpointNotWritten(
            f"the checkpoint of student update {student_updates} could not be written to '{folder.parent}' ({problem}{free}); "
            f"{self.last_good(trainer)}. Make room or set another --trainer.default_root_dir, and resume with "
            "--ckpt_path auto (or the path)."
        )


def _is_sharded(trainer: pl.Trainer) -> bool:
    """Whether every rank writes a shard; otherwise rank 0 writes one file."""
    strategy = trainer.strategy
    return isinstance(strategy, ModelParallelStrategy) and bool(strategy._save_distributed_checkpoint)
