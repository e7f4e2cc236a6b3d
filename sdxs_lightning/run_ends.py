"""How a run ended: which error it was, and the sentence and the exit code for it."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment

from sdxs_lightning.callbacks.interruption import Interruption
from sdxs_lightning.core.errors import Interrupted, RunStopped, one_line

TRACEBACK = "SDXS_TRACEBACK"
"""Environment variable: set to 1, errors that are reported in a sentence show their traceback too."""


def checks_processes(error: BaseException) -> bool:
    """Whether Lightning's check of the numbers of processes and devices raised it."""
    last = traceback.extract_tb(error.__traceback__)[-1].name
    return last in ("validate_settings", "_validate_srun_variables")


def is_our_message(error: BaseException) -> bool:
    """Whether our own code raised it deliberately: then its message is written for the user, and it is no bug."""
    frames = traceback.extract_tb(error.__traceback__)
    root = Path(__file__).resolve().parents[1]
    ours = [root / name for name in ("sdxs_lightning", "data", "evaluation")]
    return (
        bool(frames)
        and any(Path(frames[-1].filename).resolve().is_relative_to(folder) for folder in ours)
        and (frames[-1].line or "").startswith("raise ")
    )


def report(error: BaseException, agreed: bool, shown: Callable[[str], str]) -> None:
    """Writes the sentence to stderr; only rank 0 does if all ranks agreed on it.

    Args:
        error: what ended the run.
        agreed: whether all ranks end with it.
        shown: changes the text, such as to hide values of the environment.
    """
    rank = next(
        (int(os.environ[name]) for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK") if name in os.environ), 0
    )
    if agreed and rank:
        return
    if os.environ.get(TRACEBACK) == "1":
        traceback.print_exception(error)
    word = "stopped" if isinstance(error, Interrupted) else "error"
    text = shown(one_line(str(error)))
    sys.stderr.write(f"{word}{f' on rank {rank}' if rank else ''}: {text}\n")


def lost_rank(trainer: pl.Trainer | None, error: Exception) -> RunStopped | None:
    """The rank whose end made a collective fail here, if that is what happened."""
    callbacks: list[pl.Callback] = getattr(trainer, "callbacks", [])
    monitor = next((one.monitor for one in callbacks if isinstance(one, Interruption)), None)
    collective = any(
        f"{os.sep}torch{os.sep}distributed{os.sep}" in frame.filename
        for frame in traceback.extract_tb(error.__traceback__)
    ) or isinstance(error, torch.distributed.DistError)
    return monitor.explain(error) if monitor is not None and collective else None


def interrupted_early(code: int, name: str) -> int:
    """Says that a signal came where no checkpoint is written; returns the exit code."""
    sys.stderr.write(
        f"stopped: {name} came outside the training steps, or twice; checkpoints written so far are complete.\n"
    )
    return code


def started_by_rank_zero(trainer: pl.Trainer | None) -> bool:
    """Whether rank 0 of this run started this process, rather than a launcher such as torchrun or srun."""
    if trainer is None or trainer.local_rank == 0:
        return False
    connector = trainer._accelerator_connector
    return isinstance(connector.cluster_environment, LightningEnvironment)
