"""What a distillation shows of itself while it runs: scores and samples of the averaged student (speed: progress.py)."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from evaluation.generate import SampledImages
from evaluation.loops import log_now, paused, paused_seconds, student_updates_of
from evaluation.pictures import sheet
from evaluation.progress import ProgressBar, Throughput
from evaluation.protocols import get_protocol
from evaluation.scores import Judges, measure
from sdxs_lightning.batch import Conditioning
from sdxs_lightning.modules.one_step_distillation import OneStepDistillation

__all__ = ["DistillationMetrics", "ProgressBar", "SampleGrids", "Throughput", "averaged_student"]


def averaged_student(trainer: pl.Trainer, module: pl.LightningModule, seed: int = 0) -> SampledImages:
    """A maker of the EMA student's images, on the module's device, in the trainer's precision."""
    assert isinstance(module, OneStepDistillation) and module.ema is not None
    ema, precision = module.ema, trainer.precision_plugin

    def sampler(noise: Tensor, conditioning: Conditioning) -> Tensor:
        with precision.val_step_context():
            latents: Tensor = ema(noise, conditioning)
        return latents

    return SampledImages(sampler, module.family, module.device, seed)


class StudentUpdateCallback(pl.Callback):
    """Calls `at_student_update` when the student-update counter passes a multiple of a number, and where training ends.

    Lightning's global step counts every optimizer's steps, and most batches only train the critic.

    Args:
        every_n_student_updates: the number.
        at_start: also before the first update.
    """

    def __init__(self, every_n_student_updates: int, at_start: bool = True) -> None:
        if every_n_student_updates < 1:
            raise ValueError(f"every_n_student_updates must be at least 1, got {every_n_student_updates}")
        self.every_n_student_updates, self.at_start = every_n_student_updates, at_start
        self._last_seen: int | None = None

    def at_student_update(self, trainer: pl.Trainer, module: OneStepDistillation) -> None:
        """What to do; called on all ranks."""
        raise NotImplementedError

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """At update 0; a resumed run has been there."""
        if self._last_seen is not None:
            return
        self._last_seen = student_updates_of(pl_module)
        if self.at_start:
            self._call(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """At each multiple."""
        updates, seen = student_updates_of(pl_module), self._last_seen or 0
        if updates // self.every_n_student_updates > seen // self.every_n_student_updates:
            self._call(trainer, pl_module)
        self._last_seen = max(updates, seen)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """At the end, unless the last update was a multiple."""
        if student_updates_of(pl_module) % self.every_n_student_updates:
            self._call(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"last_seen": self._last_seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From the checkpoint."""
        self._last_seen = state_dict["last_seen"]

    def _call(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, OneStepDistillation)
        with paused(trainer):
            self.at_student_update(trainer, module)


class DistillationMetrics(StudentUpdateCallback):
    """FID, CLIP score and caption accuracy of the averaged student on a protocol's prompts, every n student updates.

    The scores go to the loggers and, as `val/...`, to what checkpoints may monitor. The networks that judge belong to this
    callback and are in no checkpoint; `history` is.

    Args:
        every_n_student_updates: how often.
        protocol: a name of evaluation/protocols.py; one on prompts that may choose settings.
        samples: how many images, None for the protocol's; it changes FID.
        batch_size: images per call on each device.
        at_start: also before the first update.
        clip: open_clip folder, None for the protocol's.
        classifier: attribute classifier's folder, None for the protocol's.
        reference: npz of the reference's statistics, None for the protocol's.
    """

    decodes_images = True
    """For the memory plan: the VAE is on the device."""

    def __init__(
        self,
        every_n_student_updates: int = 50,
        protocol: str = "toy-val",
        samples: int | None = None,
        batch_size: int = 100,
        at_start: bool = True,
        clip: str | None = None,
        classifier: str | None = None,
        reference: str | None = None,
    ) -> None:
        super().__init__(every_n_student_updates, at_start)
        changes = {"samples": samples, "clip": clip, "classifier": classifier, "reference": reference}
        self.protocol = get_protocol(protocol, **changes)
        self.batch_size = batch_size
        self.history: list[dict[str, float]] = []
        """One entry a measurement: `student_updates`, `seconds` of wall clock since the start of training,
        `training_seconds` without the measuring, and the scores."""
        self._judges: Judges | None = None
        self._trainer: pl.Trainer | None = None
        self._start_seconds = self._earlier_seconds = self._earlier_training_seconds = 0.0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Load the judges, so that a missing one is told before anything is trained."""
        self._judges = self._judges or Judges.load(self.protocol)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._start_seconds, self._trainer = time.perf_counter(), trainer
        super().on_train_start(trainer, pl_module)

    def at_student_update(self, trainer: pl.Trainer, module: OneStepDistillation) -> None:
        """Measure and log."""
        assert self._judges is not None
        clock = self._clock()  # read before measuring: the scores belong to this moment
        scores = measure(
            averaged_student(trainer, module, self.protocol.seed),
            self.protocol.captions(),
            self._judges,
            module.device,
            self.batch_size,
            trainer.global_rank,
            trainer.world_size,
        )
        self.history.append({"student_updates": module.student_updates, **clock, **scores.as_dict()})
        named = {f"val/{name}": value for name, value in scores.as_dict().items()}
        log_now(trainer, named)
        # What ModelCheckpoint may monitor and the progress bar shows.
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in named.items()})

    def state_dict(self) -> dict[str, Any]:
        """The curve goes on after a resume; the time between the two runs is not in it."""
        return {**super().state_dict(), "history": self.history, "clock": self._clock()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From the checkpoint."""
        super().load_state_dict(state_dict)
        self.history = list(state_dict["history"])
        self._earlier_seconds = state_dict["clock"]["seconds"]
        self._earlier_training_seconds = state_dict["clock"]["training_seconds"]

    def _clock(self) -> dict[str, float]:
        wall = measuring = 0.0
        if self._trainer is not None:
            wall, measuring = time.perf_counter() - self._start_seconds, paused_seconds(self._trainer)
        return {
            "seconds": self._earlier_seconds + wall,
            "training_seconds": self._earlier_training_seconds + wall - measuring,
        }


class SampleGrids(StudentUpdateCallback):
    """Pictures of the averaged student for fixed prompts and seeds, as PNG files and in TensorBoard.

    Args:
        every_n_student_updates: how often.
        prompts: what to draw; None takes the first `images` of the protocol's.
        images: how many.
        protocol: a name of evaluation/protocols.py, for prompts and seed.
        folder: for the PNG files; None means `samples` in the trainer's default_root_dir.
        at_start: also before the first update.
    """

    decodes_images = True
    """For the memory plan: the VAE is on the device."""

    def __init__(
        self,
        every_n_student_updates: int = 50,
        prompts: list[str] | None = None,
        images: int = 10,
        protocol: str = "toy-val",
        folder: str | None = None,
        at_start: bool = True,
    ) -> None:
        super().__init__(every_n_student_updates, at_start)
        chosen = get_protocol(protocol, samples=images)
        self.prompts = prompts if prompts is not None else chosen.captions()
        self.seed, self.folder = chosen.seed, folder

    def at_student_update(self, trainer: pl.Trainer, module: OneStepDistillation) -> None:
        """Draw on every rank, because a sharded network needs them all; write on the first."""
        maker = averaged_student(trainer, module, self.seed)
        images_uint8 = maker(self.prompts, torch.arange(len(self.prompts)))
        if not trainer.is_global_zero:
            return
        folder = Path(self.folder) if self.folder is not None else Path(trainer.default_root_dir) / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        page = sheet({f"update\n{module.student_updates}": images_uint8}, self.prompts)
        page.save(folder / f"update_{module.student_updates:08d}.png")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                step = trainer.fit_loop.epoch_loop._batches_that_stepped
                logger.experiment.add_image("samples", np.asarray(page), step, dataformats="HWC")
