"""Where in its run a stage is, by numbers on the host: asking costs no wait for the device."""

from typing import NamedTuple

import lightning.pytorch as pl


class Counts(NamedTuple):
    """Progress of a stage."""

    updates: int
    """Student updates; of a stage without a student its optimizer steps."""
    iterations: int
    """Optimizer iterations: micro-batches over `accumulate_grad_batches`."""
    batches: int
    """Micro-batches that the run has taken."""
    between_turns: bool
    """Whether no gradients are half accumulated, so that a checkpoint holds everything."""


def counts_of(trainer: pl.Trainer) -> Counts:
    """Reads `student_updates`, `iterations` and `micro_batches` of a module that counts itself, else the trainer's counters."""
    module, loop = trainer.lightning_module, trainer.fit_loop.epoch_loop
    between = (loop.batch_idx + 1) % trainer.accumulate_grad_batches == 0
    return Counts(
        updates=int(getattr(module, "student_updates", trainer.global_step)),
        iterations=int(getattr(module, "iterations", trainer.global_step)),
        batches=loop.total_batch_idx + 1,
        between_turns=between and getattr(module, "micro_batches", 0) == 0,
    )
