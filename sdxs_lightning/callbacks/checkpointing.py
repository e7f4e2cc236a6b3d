"""Atomic checkpoints every n student updates."""

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
from sdxs_lightning.callbacks.optimizer_settings import settings_of
from sdxs_lightning.callbacks.ranks import Ranks
from sdxs_lightning.callbacks.resume import KEY, Resume
from sdxs_lightning.callbacks.run_folder import unshared
from sdxs_lightning.core.errors import CheckpointNotWritten, UserError


class StreamingCheckpointIO(TorchCheckpointIO):
    """Writes directly to the file; Lightning's own IO makes a second copy in memory and goes through /tmp."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Saves with torch; `Checkpointing` makes it atomic."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            torch.save(checkpoint, file)


class Checkpointing(Checkpoint):
    """Saves atomically every n student updates and at the end, and keeps the newest checkpoints.

    Saves only between iterations, since checkpoints do not hold accumulated gradients. Lightning runs callbacks that derive
    from its `Checkpoint` after all others, so the saved callback states belong to the same batch.

    Args:
        every_n_student_updates: interval between checkpoints.
        keep: number of complete checkpoints to keep; older ones are removed once a newer one is complete.
        folder: folder of the checkpoints; None is `checkpoints` in the run's folder (`trainer.default_root_dir`).
        start_over: what to do with checkpoints of an earlier run if this one does not resume one of them: False raises,
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
        self._starts = 1
        self.resume: Resume | None = None
        """Adds the run's description to checkpoints; set by the command line, which knows the configuration, or in `setup`."""

    def run_folder(self, trainer: pl.Trainer) -> Path:
        """Returns the folder of this run's checkpoints."""
        return Path(self.folder or Path(trainer.default_root_dir) / "checkpoints")

    def saved_at(self, trainer: pl.Trainer, student_updates: int) -> Path | None:
        """The checkpoint of this student update if it is the last one that this process wrote, else None."""
        if self._saved_name is None or self._saved_updates != student_updates:
            return None
        return self.run_folder(trainer) / self._saved_name

    def last_good(self, trainer: pl.Trainer) -> str:
        """Names the newest complete checkpoint, for error messages."""
        newest = folders.newest_complete_checkpoint(self.run_folder(trainer))
        return f"the last good checkpoint is {newest}" if newest else "there is no checkpoint yet"

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Checks before training that checkpoints can be written.

        Raises:
            UserError: on all ranks, if they cannot.
        """
        trainer.strategy.checkpoint_io = StreamingCheckpointIO()
        if self.resume is None and self in trainer.checkpoint_callbacks:
            self.resume = Resume(trainer, {}, older_ones=False)
        folder = self.run_folder(trainer)
        self._refuse_together(self._unwritable(folder) if self.ranks.first else None)
        self._refuse_together(unshared(folder, self.ranks))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keeps this run's checkpoints apart from an earlier run's.

        Raises:
            UserError: on all ranks, if the folder holds checkpoints of an earlier run.
        """
        self.refuse_earlier_run(trainer)
        if self.start_over and self.ranks.first and not self._resumes_here(trainer):
            folders.keep_newest(self.run_folder(trainer), 0)
        self._saved_updates = counts_of(
            trainer
        ).updates  # a checkpoint that was resumed from is not saved again
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
        """Saves every n student updates."""
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

    def save(self, trainer: pl.Trainer) -> Path:
        """Writes a checkpoint now. A collective: all ranks must call it, between iterations.

        Returns:
            The checkpoint's folder.

        Raises:
            TrainingDiverged: if weights are not finite.
            CheckpointNotWritten: on all ranks, if any rank could not write; the previous checkpoint is untouched.
        """
        counts = counts_of(trainer)
        name = folders.checkpoint_name(counts.updates, counts.batches)
        folder = self.run_folder(trainer) / name
        if name == self._saved_name:
            return folder
        check_before_saving(trainer)
        problem = self._write(trainer, folder)
        reports = self.ranks.gathered((problem, {} if problem else self._own_checksums(folder)))
        problem = next((reason for reason, _ in reports if reason), None)
        if self.ranks.first and problem is None:
            problem = self._seal(
                folder, counts, {name: one for _, sums in reports for name, one in sums.items()}
            )
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
            # Not trainer.save_checkpoint: its barrier follows the write, so a rank whose write fails would leave the others
            # waiting.
            checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
            trainer.strategy.save_checkpoint(checkpoint, partial / folders.STATE)
        except (OSError, RuntimeError, CheckpointException) as error:
            problem = folders.write_failure(error)
            if problem is None:
                raise
            return problem
        return None

    def _own_checksums(self, folder: Path) -> dict[str, str]:
        """Checksums of the shards that this rank wrote, which are in its page cache; rank 0 would have to read them all."""
        partial = folders.partial_of(folder)
        own = [
            name
            for name in folders.files_of(partial)
            if Path(name).name.startswith(f"__{self.ranks.number}_")
        ]
        return folders.checksums(partial, own)

    def _seal(self, folder: Path, counts: Counts, sums: dict[str, str]) -> str | None:
        try:
            size = folders.seal(folder, counts.updates, counts.iterations, counts.batches, self._starts, sums)
            folders.keep_newest(folder.parent, self.keep)
        except OSError as error:
            return folders.write_failure(error)
        rank_zero_info(f"Checkpoint of student update {counts.updates}: {folder} ({size / 1e6:.1f} MB)")
        return None

    def _give_up(self, trainer: pl.Trainer, folder: Path, student_updates: int, problem: str) -> None:
        self.ranks.wait()  # no rank still writes into the folder to be removed
        if self.ranks.first:
            shutil.rmtree(folders.partial_of(folder), ignore_errors=True)
        free = ""
        if self.ranks.first and folder.parent.is_dir():
            free = f", {shutil.disk_usage(folder.parent).free / 1e6:.0f} MB are free"
        raise CheckpointNotWritten(
            f"the checkpoint of student update {student_updates} could not be written to '{folder.parent}' ({problem}{free}); "
            f"{self.last_good(trainer)}. Make room or set another --trainer.default_root_dir, and resume with "
            "--ckpt_path auto (or the path)."
        )
