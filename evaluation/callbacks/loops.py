"""What the callbacks ask of a running trainer and of the module that it trains."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar
from weakref import WeakKeyDictionary

import lightning.pytorch as pl

from sdxs_lightning.stages.distillation.step import OneStepDistillation

C = TypeVar("C", bound=pl.Callback)
_PAUSED_SECONDS: WeakKeyDictionary[pl.Trainer, float] = WeakKeyDictionary()


@contextmanager
def paused(trainer: pl.Trainer) -> Iterator[None]:
    """Counts the time inside as measuring, so that throughput and curves can leave it out."""
    start = time.perf_counter()
    try:
        yield
    finally:
        _PAUSED_SECONDS[trainer] = paused_seconds(trainer) + time.perf_counter() - start


def paused_seconds(trainer: pl.Trainer) -> float:
    """How long this trainer has measured so far."""
    return _PAUSED_SECONDS.get(trainer, 0.0)


def log_now(trainer: pl.Trainer, values: Mapping[str, float]) -> None:
    """Hand values to the loggers at once: `log_dict` drops what falls between two of `log_every_n_steps`.

    The step is the one that Lightning gives to the module's own logs, so that all curves lie on one axis.
    """
    for logger in trainer.loggers:
        logger.log_metrics(dict(values), step=trainer.fit_loop.epoch_loop._batches_that_stepped)


def callback_of(trainer: pl.Trainer, kind: type[C]) -> C | None:
    """The first of the trainer's callbacks of a kind."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, kind)), None)


def student_updates_of(module: pl.LightningModule) -> int:
    """The counter that progress is measured in.

    Raises:
        TypeError: for a module that is no OneStepDistillation.
    """
    if not isinstance(module, OneStepDistillation):
        raise TypeError(
            f"this callback follows a OneStepDistillation, not a {type(module).__name__}; take it out of "
            "trainer.callbacks"
        )
    return module.student_updates
