"""Keeps the checkpoint with the best score, beside the newest ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info

from evaluation.callbacks.score_curve import ScoreCurve
from evaluation.reports.markdown import LOWER_IS_BETTER
from sdxs_lightning.callbacks.checkpointing import Checkpointing
from sdxs_lightning.callbacks.counts import counts_of


class BestCheckpoint(Checkpoint):
    """Saves a complete checkpoint whenever a score is the best so far, and removes the previous best.

    Training can resume from it (`--ckpt_path <run>/best/<folder>`). Like all of Lightning's checkpoint callbacks, it runs after
    the other callbacks.

    Args:
        metric: a score of DistillationMetrics or ImageMetrics: `fid`, `clip_score`, `caption_accuracy`, ...
        folder: destination; None is `best` in the run's folder.
        start_over: whether a run that does not resume removes an earlier run's best checkpoint; False refuses to start.
    """

    checkpoints_in = "best"
    """Default folder in the run's folder."""

    def __init__(self, metric: str = "fid", folder: str | None = None, start_over: bool = False) -> None:
        self.metric, self.folder = metric, folder
        self.best: float | None = None
        """Best score saved so far."""
        # A measurement has taken minutes: waiting for the disk as well is little, and needs no host memory.
        self._writer = Checkpointing(keep=1, folder=folder, start_over=start_over, asynchronous=False)
        self._seen = 0
        self._pending: float | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Checks before training that the folder is writable."""
        self._writer.folder = self.folder or str(Path(trainer.default_root_dir) / self.checkpoints_in)
        self._writer.setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ignores scores from before the first update.

        Raises:
            UserError: if the folder holds an earlier run's checkpoint.
        """
        self._writer.on_train_start(trainer, pl_module)
        self._seen = len(self._history(trainer))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves after a new best score, between iterations like all checkpoints."""
        self._update_best(trainer)
        if counts_of(trainer).between_iterations:
            self._save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves if the last measurement is the best."""
        self._update_best(trainer)
        self._save(trainer)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]

    def _history(self, trainer: pl.Trainer) -> list[dict[str, float]]:
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        curves = [one.history for one in callbacks if isinstance(one, ScoreCurve)]
        return [point for history in curves for point in history if self.metric in point]

    def _update_best(self, trainer: pl.Trainer) -> None:
        history = self._history(trainer)
        for point in history[self._seen :]:
            score, known = point[self.metric], self.best if self._pending is None else self._pending
            better = known is None or (score < known if self.metric in LOWER_IS_BETTER else score > known)
            if better:
                self._pending = score
        self._seen = len(history)

    def _save(self, trainer: pl.Trainer) -> None:
        if self._pending is None:
            return
        self.best, self._pending = self._pending, None
        folder = self._writer.save(trainer)
        rank_zero_info(f"Best {self.metric} so far, {self.best:.4g}: {folder}")
