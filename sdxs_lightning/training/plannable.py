"""How a stage describes itself to the memory plan: its networks, and one worst-case training step.

The plan (`sdxs_lightning/memory_plan/`) gives a stage a family without weights, calls `configure_model`, moves everything to
the meta device and runs the step that the stage names. So a stage repeats nothing of itself: it calls its own methods.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, runtime_checkable

from lightning.pytorch.cli import OptimizerCallable
from torch import nn

from sdxs_lightning.core.batch import TrainingBatch

Role = Literal["trained", "averaged", "frozen"]


@dataclass(frozen=True, eq=False)
class PlannedNetwork:
    """A network that is on the device while the stage trains."""

    name: str
    """As the stage calls it."""
    module: nn.Module
    role: Role
    """"trained" has gradients and optimizer state, "averaged" follows a trained one, "frozen" has weights alone."""
    optimizer: OptimizerCallable | None = None
    """Of a trained network; its state is measured on a small one."""
    sharded: bool = True
    """Whether the stage shards it where the strategy has a device mesh."""


class PlannedPhase(NamedTuple):
    """What has just been run, forward and backward."""

    name: str
    updates: tuple[str, ...]
    """Networks whose optimizers step now, after which their gradients are gone."""


@runtime_checkable
class Plannable(Protocol):
    """A stage that the memory plan knows how to read."""

    def plan_networks(self) -> list[PlannedNetwork]:
        """Every network on the device but the family's own (text encoders, VAE); called after `configure_model`."""

    def plan_step(self, batch: TrainingBatch) -> Iterator[PlannedPhase]:
        """Runs the most expensive training step, and yields after each backward pass.

        Tensors are on the meta device: shapes and types are real, values do not exist. No optimizer is stepped. With
        manual optimisation `manual_backward` works as in training.
        """
