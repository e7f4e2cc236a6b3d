"""What callbacks that look at the averaged student share: when to look, how to draw, and leaving the GPU as it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from evaluation.callbacks.loops import paused, student_updates_of
from evaluation.images.generate import SampledImages
from sdxs_lightning.core.batch import Conditioning
from sdxs_lightning.stages.distillation.step import OneStepDistillation


def averaged_student(trainer: pl.Trainer, module: pl.LightningModule, seed: int = 0) -> SampledImages:
    """A maker of the EMA student's images, on the module's device, in the trainer's precision."""
    assert isinstance(module, OneStepDistillation) and module.ema is not None
    ema, precision = module.ema, trainer.precision_plugin

    def sampler(noise: Tensor, conditioning: Conditioning) -> Tensor:
        with precision.val_step_context():
            latents: Tensor = ema(noise, conditioning)
        return latents

    return SampledImages(sampler, module.family, module.device, seed)


@contextmanager
def only_while_measuring(module: OneStepDistillation) -> Iterator[None]:
    """Takes the VAE off the GPU afterwards, unless training had it there: for SD and SDXL it is 335 MB."""
    device = module.device
    if device.type == "cpu":
        yield
        return
    before = module.family.__dict__.get("_vae")  # loaded when it is first asked for
    was_there = before is not None and next(before.module.parameters()).device == device
    if before is not None:
        before.to(device)
    try:
        yield
    finally:
        vae = module.family.__dict__.get("_vae")
        if vae is not None and not was_there:
            give_back([vae], device)


def give_back(networks: Sequence[Any], device: torch.device) -> None:
    """Moves networks to the CPU and returns their memory to the driver; nothing to do on a CPU."""
    if device.type == "cpu":
        return
    for network in networks:
        if hasattr(network, "to"):
            network.to(torch.device("cpu"))
    torch.cuda.empty_cache()


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
