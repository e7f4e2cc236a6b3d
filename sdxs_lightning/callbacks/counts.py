"""A stage's progress counters, kept on the host, so that reading them does not synchronise with the device."""

from typing import NamedTuple

import lightning.pytorch as pl


class Counts(NamedTuple):
    """Progress of a stage."""

    updates: int
    """Student updates; optimizer steps in a stage without a student."""
    iterations: int
    """Optimizer iterations: micro-batches over `accumulate_grad_batches`."""
    batches: int
    """Micro-batches of the run so far."""
    between_iterations: bool
    """Whether no gradients are partly accumulated, so that a checkpoint is complete."""


def counts_of(trainer: pl.Trainer) -> Counts:
    """Reads `student_updates`, `iterations` and `micro_batches` of the module if present, else the trainer's counters."""
    module, loop = trainer.lightning_module, trainer.fit_loop.epoch_loop
    between = (loop.batch_idx + 1) % trainer.accumulate_grad_batches == 0
    return Counts(
        updates=int(getattr(module, "student_updates", trainer.global_step)),
        iterations=int(getattr(module, "iterations", trainer.global_step)),
        batches=loop.total_batch_idx + 1,
        between_iterations=between and getattr(module, "micro_batches", 0) == 0,
    )
