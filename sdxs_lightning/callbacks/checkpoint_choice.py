"""Which checkpoint `--ckpt_path` means."""

from __future__ import annotations

import sys
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.strategies import ModelParallelStrategy

from sdxs_lightning.callbacks import checkpoint_folder as folders
from sdxs_lightning.callbacks.checkpoint_writer import META
from sdxs_lightning.callbacks.checkpointing import Checkpointing
from sdxs_lightning.core.errors import UserError


def chosen_checkpoint(trainer: pl.Trainer, wanted: str | None, says_damaged: bool = True) -> str | None:
    """The checkpoint that `--ckpt_path` means, checked; None for a new run.

    Args:
        trainer: with its strategy and callbacks.
        wanted: the option: a path, "last", "auto" or None.
        says_damaged: whether to name the damaged checkpoints that are passed over.

    Raises:
        UserError: if it is not there, not complete, or of another strategy.
    """
    path = None if wanted is None else Path(wanted)
    if wanted in ("last", "auto"):
        path = _newest(trainer, wanted, says_damaged)
    if path is None:
        _refuse_automatic_resume(trainer)
        return None
    if path.name == folders.MANIFEST:
        path = path.parent
    if (path / folders.MANIFEST).exists() or (path / folders.STATE).exists():
        if not folders.complete(path):
            raise UserError(
                f"the checkpoint '{path}' is not complete: a file is missing or shorter than its {folders.MANIFEST} says, or "
                "that has changed; take an older one, or --ckpt_path last for the newest complete one."
            )
        path = path / folders.STATE
    if not path.exists():
        raise UserError(f"--ckpt_path '{path}' does not exist; give a checkpoint, 'last' or 'auto'.")
    if path.is_dir() and not (path / META).exists():
        raise UserError(
            f"--ckpt_path '{path}' is a folder, and not of a checkpoint; give one like '{folders.checkpoint_name(500, 3000)}', "
            "'last' or 'auto'."
        )
    if path.is_dir() and not isinstance(trainer.strategy, ModelParallelStrategy):
        raise UserError(
            f"the checkpoint '{path}' is sharded; resume with --config configs/hardware/fsdp2.yaml, which reads it on any "
            "number of devices (one: --trainer.devices 1, with data.init_args.batch_size for the same global batch)."
        )
    return str(path)


def _newest(trainer: pl.Trainer, wanted: str, says_damaged: bool) -> Path | None:
    saver = next((one for one in trainer.checkpoint_callbacks if isinstance(one, Checkpointing)), None)
    folder = (saver or Checkpointing()).run_folder(trainer)
    newest = folders.newest_complete_checkpoint(folder)
    broken = folders.incomplete_checkpoints(folder)
    # A write that was cut off is no reason against a new run; a checkpoint that was complete once is.
    damaged = [path for path in broken if not path.name.startswith(".")]
    if newest is None and (wanted == "last" or damaged):
        found = f"only {len(broken)} incomplete one(s)" if broken else "none"
        way = f"remove '{folder}'" if damaged else "use --ckpt_path auto"
        raise UserError(
            f"--ckpt_path {wanted} looks for the newest complete checkpoint in '{folder}' and found {found};"
            f" {way} to begin a new run, or give the run's folder as --trainer.default_root_dir."
        )
    if damaged and says_damaged:
        sys.stderr.write(
            f"resume: not complete in '{folder}' (a file is missing or shorter than {folders.MANIFEST} says, or that has "
            f"changed), and left there: {', '.join(path.name for path in damaged)}; the newest complete checkpoint is "
            f"{newest.name if newest is not None else 'none'}.\n"
        )
    return newest


def _refuse_automatic_resume(trainer: pl.Trainer) -> None:
    """Under SLURM, Lightning resumes by itself from a file that its own signal handler left."""
    left: str | None = trainer._checkpoint_connector._hpc_resume_path
    if left is not None:
        raise UserError(
            f"'{left}' was written by Lightning's own SLURM handler, and Lightning would resume from it unasked; give it "
            "as --ckpt_path, or remove it."
        )
