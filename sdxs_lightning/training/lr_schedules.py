"""Learning rate schedules."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class TwoPhaseLR(LambdaLR):
    """Separate rates for the warm-up stage and for distillation, each with its own decay; counted in updates.

    Warm-up: half cosine from lr * first_phase_factor to lr. Distillation: half cosine from lr to lr * final_factor at
    total_updates, after a linear ramp over ramp_updates.

    Args:
        optimizer: its lr is the initial rate of distillation.
        total_updates: updates of the run.
        first_phase_updates: updates of the warm-up stage.
        first_phase_factor: initial rate of the warm-up relative to lr.
        ramp_updates: updates over which distillation's rate rises from 0 to lr.
        final_factor: final rate relative to lr; 1 keeps it constant.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_updates: int,
        first_phase_updates: int = 0,
        first_phase_factor: float = 1.0,
        ramp_updates: int = 0,
        final_factor: float = 1.0,
    ) -> None:
        def factor(update: int) -> float:
            if update < first_phase_updates:
                return 1 + (first_phase_factor - 1) * _half_cosine(update / first_phase_updates)
            done = update - first_phase_updates
            ramp = min(1.0, (done + 1) / ramp_updates) if ramp_updates else 1.0
            share = done / max(1, total_updates - first_phase_updates)
            return ramp * (final_factor + (1 - final_factor) * _half_cosine(share))

        super().__init__(optimizer, factor)


def _half_cosine(share: float) -> float:
    """1 at share 0, 0 at share 1 and after."""
    return 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


class TrapezoidLR(LambdaLR):
    """Linear rise, plateau, linear decay to zero; the plateau can be extended without restarting.

    Args:
        optimizer: its lr is the plateau's rate.
        total_updates: updates of the run; the decay ends there.
        rise_updates: updates of the rise.
        fall_updates: updates of the decay.
    """

    def __init__(
        self, optimizer: Optimizer, total_updates: int, rise_updates: int, fall_updates: int
    ) -> None:
        def factor(update: int) -> float:
            rise = (update + 1) / rise_updates if rise_updates else 1.0
            fall = (total_updates - update) / fall_updates if fall_updates else 1.0
            return max(0.0, min(1.0, rise, fall))

        super().__init__(optimizer, factor)
