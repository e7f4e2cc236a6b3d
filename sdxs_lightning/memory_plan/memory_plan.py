"""The plan itself: what is on a device, how full it gets, and whether that fits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sdxs_lightning.memory_plan.hardware import Hardware
from sdxs_lightning.memory_plan.states import NetworkBytes
from sdxs_lightning.memory_plan.step_memory import StepProfile

MARGIN = 0.15
"""By how much the activations may be more than counted: workspaces of kernels, fragments of the allocator."""
LARGEST_BATCH = 1 << 16


@dataclass(frozen=True)
class MemoryPlan:
    """One device of a run."""

    stage: str
    hardware: Hardware
    batch_size: int
    accumulate: int
    resolution: int | None
    networks: tuple[NetworkBytes, ...]
    buffers: Mapping[str, int]
    """Bytes beside the networks that are there all the time."""
    checkpointed: tuple[str, ...]
    """Trained networks that recompute blocks."""
    step: StepProfile

    @property
    def standing(self) -> int:
        """Bytes that are there all the time: weights, optimizer states, buffers."""
        return sum(one.weights + one.optimizer for one in self.networks) + sum(self.buffers.values())

    def needed(self, batch_size: int | None = None) -> int:
        """Bytes at the fullest moment, as counted."""
        return self.standing + self.step.peak(batch_size or self.batch_size).total

    def needed_at_most(self, batch_size: int | None = None) -> int:
        """The same with the margin on what is no exact number."""
        moments = self.step.moments(batch_size or self.batch_size)
        return self.standing + max(moment.total + int(MARGIN * moment.activations) for moment in moments)

    @property
    def fits(self) -> bool:
        """Whether it fits with the margin."""
        return self.needed_at_most() <= self.hardware.memory

    @property
    def largest_batch(self) -> int:
        """The largest batch per device that fits with the margin; 0 if none does."""
        low, high = 0, 1
        while high < LARGEST_BATCH and self.needed_at_most(high) <= self.hardware.memory:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (
                (middle, high) if self.needed_at_most(middle) <= self.hardware.memory else (low, middle)
            )
        return low


@dataclass(frozen=True)
class Change:
    """Something that would make it fit, or at least smaller."""

    what: str
    plan: MemoryPlan
