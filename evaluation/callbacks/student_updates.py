"""Shared by the metric callbacks: images of the averaged student, intervals, time and GPU memory of measurements."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from evaluation.images.generate import SampledImages
from sdxs_lightning.core.batch import Conditioning
from sdxs_lightning.core.errors import UserError
from sdxs_lightning.stages.distillation.step import OneStepDistillation

C = TypeVar("C", bound=pl.Callback)
_PAUSED_SECONDS: WeakKeyDictionary[pl.Trainer, float] = WeakKeyDictionary()


@contextmanager
def paused(trainer: pl.Trainer) -> Iterator[None]:
    """Context in which time counts as measuring, which throughput and curves exclude."""
    start = time.perf_counter()
    try:
        yield
    finally:
        _PAUSED_SECONDS[trainer] = paused_seconds(trainer) + time.perf_counter() - start


def paused_seconds(trainer: pl.Trainer) -> float:
    """Time that this trainer has spent on measuring."""
    return _PAUSED_SECONDS.get(trainer, 0.0)


def log_now(trainer: pl.Trainer, values: Mapping[str, float | str]) -> None:
    """Log values immediately: `log_dict` drops values between multiples of `log_every_n_steps`.

    Uses the step of the module's own logs, so that all curves share an axis. TensorBoard gets texts as texts.
    """
    step = trainer.fit_loop.epoch_loop._batches_that_stepped
    for logger in trainer.loggers:
        logged: dict[str, Any] = dict(values)
        if isinstance(logger, TensorBoardLogger):
            for name in [name for name, value in values.items() if isinstance(value, str)]:
                logger.experiment.add_text(name, logged.pop(name), step)
        logger.log_metrics(logged, step=step)


def callback_of(trainer: pl.Trainer, kind: type[C]) -> C | None:
    """The trainer's first callback of a class, or None."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, kind)), None)


def student_updates_of(module: pl.LightningModule) -> int:
    """Student updates so far.

    Raises:
        UserError: unless the module is a OneStepDistillation.
    """
    if not isinstance(module, OneStepDistillation):
        raise UserError(
            f"this callback needs a OneStepDistillation, got a {type(module).__name__}; remove it from trainer.callbacks"
        )
    return module.student_updates


def averaged_student(trainer: pl.Trainer, module: pl.LightningModule, seed: int = 0) -> SampledImages:
    """Image maker of the EMA student, on the module's device, in the trainer's precision."""
    assert isinstance(module, OneStepDistillation) and module.ema is not None
    ema, precision = module.ema, trainer.precision_plugin

    def sampler(noise: Tensor, conditioning: Conditioning) -> Tensor:
        with precision.val_step_context():
            latents: Tensor = ema(noise, conditioning)
        return latents

    return SampledImages(sampler, module.family, module.device, seed)


@contextmanager
def vae_on_device(module: OneStepDistillation) -> Iterator[None]:
    """Context in which the VAE is on the device; it (335 MB for SD and SDXL) is moved back unless training keeps it there."""
    device = module.device
    if device.type == "cpu":
        yield
        return
    before = module.family.__dict__.get("_vae")  # a cached property
    was_there = before is not None and next(before.module.parameters()).device == device
    if before is not None:
        before.to(device)
    try:
        yield
    finally:
        vae = module.family.__dict__.get("_vae")
        if vae is not None and not was_there:
            release_gpu([vae], device)


def release_gpu(networks: Sequence[Any], device: torch.device) -> None:
    """Move networks from a GPU to the CPU and return their memory to the driver."""
    if device.type == "cpu":
        return
    for network in networks:
        if hasattr(network, "to"):
            network.to(torch.device("cpu"))
    torch.cuda.empty_cache()


def check_counts(callback: str, **counts: int | None) -> None:
    """Raises ValueError for a number of images below 1; None is the protocol's."""
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name} of the callback {callback} must be at least 1, got {count}")


class StudentUpdateCallback(pl.Callback):
    """Calls `at_student_update` every n student updates, and at the end of training.

    Lightning's global step counts the steps of all optimizers, and most batches do not update the student.

    Args:
        every_n_student_updates: n.
        at_start: also before the first update.
    """

    def __init__(self, every_n_student_updates: int, at_start: bool = True) -> None:
        if every_n_student_updates < 1:
            raise ValueError(f"every_n_student_updates must be at least 1, got {every_n_student_updates}")
        self.every_n_student_updates, self.at_start = every_n_student_updates, at_start
        self._last_seen: int | None = None

    def at_student_update(self, trainer: pl.Trainer, module: OneStepDistillation) -> None:
        """Called on all ranks."""
        raise NotImplementedError

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._last_seen is not None:  # resumed
            return
        self._last_seen = student_updates_of(pl_module)
        if self.at_start:
            self._call(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        updates, seen = student_updates_of(pl_module), self._last_seen or 0
        if updates // self.every_n_student_updates > seen // self.every_n_student_updates:
            self._call(trainer, pl_module)
        self._last_seen = max(updates, seen)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if student_updates_of(pl_module) % self.every_n_student_updates:
            self._call(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {"last_seen": self._last_seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._last_seen = state_dict["last_seen"]

    def _call(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, OneStepDistillation)
        with paused(trainer):
            self.at_student_update(trainer, module)
