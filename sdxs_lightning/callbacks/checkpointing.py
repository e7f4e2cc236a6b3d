"""Checkpoints that are complete or not there, counted in student updates."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_info
from torch.distributed.checkpoint.api import CheckpointException

from sdxs_lightning.callbacks import checkpoint_folder as folders
from sdxs_lightning.callbacks.counts import Counts, counts_of
from sdxs_lightning.callbacks.nan_guard import check_before_saving
from sdxs_lightning.callbacks.ranks import Ranks
from sdxs_lightning.core.errors import CheckpointNotWritten, UserError


class StreamingCheckpointIO(TorchCheckpointIO):
    """Writes straight into the file. Lightning's own builds a second copy in memory and passes through /tmp."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Saves with torch; `Checkpointing` cares for atomicity."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            torch.save(checkpoint, file)


class Checkpointing(Checkpoint):
    """Saves every n student updates and at the end, atomically, and keeps the newest few.

    Saves only between iterations: gradients that are half accumulated are in no checkpoint. Lightning runs the callbacks that
    derive from its `Checkpoint` after all others, so that their states belong to the same batch.

    Args:
        every_n_student_updates: distance of two checkpoints.
        keep: how many complete checkpoints stay; older ones are removed after a newer one is safe.
        folder: where they go; None is `checkpoints` in the run's folder (`trainer.default_root_dir`).
        start_over: what happens to checkpoints of an earlier run when this one does not resume: False refuses to start,
            True removes them.

    Raises:
        ValueError: unless every_n_student_updates and keep are at least 1.
    """

    def __init__(
        self,
        every_n_student_updates: int = 500,
        keep: int = 2,
        folder: str | None = None,
        start_over: bool = False,
    ) -> None:
        for name, value in (("every_n_student_updates", every_n_student_updates), ("keep", keep)):
            if value < 1:
                raise ValueError(f"Checkpointing.{name} must be 1 or more, got {value}.")
        self.every_n_student_updates = every_n_student_updates
        self.keep = keep
        self.folder = folder
        self.start_over = start_over
        self.ranks = Ranks()
        self._saved_updates = 0
        self._saved_name: str | None = None

    def run_folder(self, trainer: pl.Trainer) -> Path:
        """Where this run's checkpoints are."""
        return Path(self.folder or Path(trainer.default_root_dir) / "checkpoints")

    def saved_at(self, trainer: pl.Trainer, student_updates: int) -> Path | None:
        """The checkpoint that this process wrote after so many student updates, if it was its last one."""
        if self._saved_name is None or self._saved_updates != student_updates:
            return None
        return self.run_folder(trainer) / self._saved_name

    def last_good(self, trainer: pl.Trainer) -> str:
        """The newest complete checkpoint, in words for a message."""
        newest = folders.newest_complete_checkpoint(self.run_folder(trainer))
        return f"the last good checkpoint is {newest}" if newest else "there is no checkpoint yet"

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Finds out before the training, not an hour into it, whether checkpoints can be written.

        Raises:
            UserError: on all ranks, if not.
        """
        trainer.strategy.checkpoint_io = StreamingCheckpointIO()
        self._refuse_together(self._unwritable(self.run_folder(trainer)) if self.ranks.first else None)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keeps two runs apart; what was resumed from needs no saving again.

        Raises:
            UserError: on all ranks, if an earlier run's checkpoints are in the way.
        """
        if trainer.ckpt_path is None:
            self._refuse_together(self._in_the_way(self.run_folder(trainer)) if self.ranks.first else None)
        self._saved_updates = counts_of(trainer).updates

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

    def _in_the_way(self, folder: Path) -> str | None:
        earlier = folders.complete_checkpoints(folder)
        if earlier and not self.start_over:
            return (
                f"'{folder}' holds checkpoints of an earlier run (newest: {earlier[-1].name}); go on with it by --ckpt_path "
                "last, choose another --trainer.default_root_dir, or set start_over: true of Checkpointing to remove them."
            )
        if earlier:
            folders.keep_newest(folder, 0)
        return None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves where a multiple of n student updates was passed."""
        counts, n = counts_of(trainer), self.every_n_student_updates
        if counts.between_iterations and counts.updates // n > self._saved_updates // n:
            self.save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves what the run came to."""
        self.save(trainer)

    def save(self, trainer: pl.Trainer) -> Path:
        """Writes a checkpoint now. A collective: all ranks call it, between iterations.

        Returns:
            The checkpoint's folder.

        Raises:
            TrainingDiverged: instead of saving weights that are not finite.
            CheckpointNotWritten: on all ranks, if any of them could not write; the previous checkpoint is untouched.
        """
        counts = counts_of(trainer)
        name = folders.checkpoint_name(counts.updates, counts.batches)
        folder = self.run_folder(trainer) / name
        if name == self._saved_name:
            return folder
        check_before_saving(trainer)
        problem = self._write(trainer, folder)
        if self.ranks.first and problem is None:
            problem = self._seal(folder, counts)
        problem = self.ranks.first_message(problem)
        if problem:
            self._give_up(trainer, folder, counts.updates, problem)
        self._saved_updates, self._saved_name = counts.updates, name
        return folder

    def _write(self, trainer: pl.Trainer, folder: Path) -> str | None:
        partial = folders.partial_of(folder)
        try:
            if self.ranks.first:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            # Not trainer.save_checkpoint: its barrier comes after the write, so a rank whose write fails would leave the
            # others waiting there.
            checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
            trainer.strategy.save_checkpoint(checkpoint, partial / folders.STATE)
        except (OSError, RuntimeError, CheckpointException) as error:
            problem = folders.write_failure(error)
            if problem is None:
                raise
            return problem
        return None

    def _seal(self, folder: Path, counts: Counts) -> str | None:
        try:
            size = folders.seal(folder, counts.updates, counts.iterations, counts.batches)
            folders.keep_newest(folder.parent, self.keep)
        except OSError as error:
            return folders.write_failure(error)
        rank_zero_info(f"Checkpoint of student update {counts.updates}: {folder} ({size / 1e6:.1f} MB)")
        return None

    def _give_up(self, trainer: pl.Trainer, folder: Path, student_updates: int, problem: str) -> None:
        self.ranks.wait()  # nobody writes into the folder that is about to be removed
        if self.ranks.first:
            shutil.rmtree(folders.partial_of(folder), ignore_errors=True)
        free = ""
        if self.ranks.first and folder.parent.is_dir():
            free = f", {shutil.disk_usage(folder.parent).free / 1e6:.0f} MB are free"
        raise CheckpointNotWritten(
            f"the checkpoint of student update {student_updates} could not be written to '{folder.parent}' ({problem}{free}); "
            f"{self.last_good(trainer)}. Make room or set another --trainer.default_root_dir, and go on with --ckpt_path "
            "last (or the path)."
        )
