"""What a run checks before its first batch: processes, checkpoint, the lock of its folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import lightning.pytorch as pl

from sdxs_lightning.callbacks import checkpoint_folder as folders
from sdxs_lightning.callbacks.checkpoint_choice import chosen_checkpoint
from sdxs_lightning.callbacks.checkpointing import Checkpointing
from sdxs_lightning.callbacks.interruption import Interruption
from sdxs_lightning.callbacks.ranks import Ranks
from sdxs_lightning.callbacks.save_config import SaveConfig
from sdxs_lightning.core.errors import UserError
from sdxs_lightning.training.run_logs import RunLog


def check_process_count(trainer: pl.Trainer) -> None:
    """Raises UserError if a launcher started another number of processes than the trainer is set to."""
    environment = trainer._accelerator_connector.cluster_environment
    if not environment.creates_processes_externally:
        return
    devices: int = trainer.num_devices
    count, wanted = environment.world_size(), trainer.num_nodes * devices
    if count != wanted:
        raise UserError(
            f"the launcher started {count} processes, but trainer.num_nodes {trainer.num_nodes} x trainer.devices "
            f"{devices} are {wanted}; start one process per device (sbatch --ntasks-per-node, torchrun "
            "--nproc-per-node), or change trainer.num_nodes and trainer.devices."
        )


def record_collectives(folder: Path) -> None:
    """Lets NCCL keep its last collectives, and write them to the run's folder when one exceeds its time-out."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_FR_DUMP_ON_TIMEOUT", "1")
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(folder.resolve() / "nccl_trace_rank_"))


def check_folder_first(trainer: pl.Trainer, wanted: str | None) -> None:
    """Chooses the checkpoint, and locks and checks the run's folder, once the ranks are connected.

    The callbacks' `setup` would be too late: the data sets the fault file of an earlier run aside in `prepare_data`, and
    the logger its metrics.csv, and both may be those of a run that is still training.

    Args:
        trainer: before its fit.
        wanted: the option `--ckpt_path`.
    """
    connector = trainer._data_connector
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
    prepare_data = connector.prepare_data

    def checked_first() -> None:
        for callback in callbacks:
            if isinstance(callback, Interruption):
                callback.watch_ranks(trainer)
        _choose_checkpoint(trainer, wanted, says_damaged=False)  # refused before the folder is made
        for callback in callbacks:
            if isinstance(callback, SaveConfig):
                callback.take_lock(trainer)
        _choose_checkpoint(trainer, wanted)  # the run that held the lock may have saved since
        for callback in callbacks:
            if isinstance(callback, Checkpointing):
                callback.refuse_earlier_run(trainer)
        prepare_data()

    connector.prepare_data = checked_first  # type: ignore[method-assign]


def _choose_checkpoint(trainer: pl.Trainer, wanted: str | None, says_damaged: bool = True) -> None:
    """Sets on all ranks what `--ckpt_path` means to rank 0; a network file system may show the others an old listing.

    Raises:
        UserError: on all ranks.
    """
    ranks = Ranks()
    path = problem = None
    if ranks.first:
        try:
            path = chosen_checkpoint(trainer, wanted, says_damaged)
        except UserError as error:
            problem = str(error)
    path, problem = ranks.of_first((path, problem))
    if problem is not None:
        raise UserError(problem)
    # As an attribute, so that the DataModule sees in prepare_data whether this run resumes.
    trainer.ckpt_path = path
    for logger in trainer.loggers:
        if isinstance(logger, RunLog):
            logger.resumed = path is not None


def report_nothing_done(trainer: pl.Trainer, path: Path | None) -> None:
    """Says that a checkpoint was at the end of the run already.

    Args:
        trainer: after its fit.
        path: of the checkpoint that it resumed from; None for a new run.
    """
    manifest = folders.read_manifest(path.parent) if path is not None else None
    batches = trainer.fit_loop.epoch_loop.total_batch_idx + 1
    if path is not None and manifest is not None and batches <= manifest.batches and trainer.is_global_zero:
        sys.stderr.write(
            f"nothing to do: the checkpoint {path.parent} is at the end of the run (student update "
            f"{manifest.student_updates}); raise update_schedule.max_student_updates or trainer.max_steps to continue.\n"
        )
