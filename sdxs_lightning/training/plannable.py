"""How a stage describes itself to the memory plan: its networks, and one worst-case training step.

The plan (`sdxs_lightning/memory_plan/`) gives the stage a family without weights, calls `configure_model`, moves everything to
the meta device and runs the stage's `plan_step`, which calls the methods of the real training step.
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
    """A network that is on the device during training."""

    name: str
    """Name in the plan."""
    module: nn.Module
    role: Role
    """"trained" has gradients and optimizer state, "averaged" is an average of a trained one, "frozen" has weights only."""
    optimizer: OptimizerCallable | None = None
    """Optimizer of a trained network; its state is measured on a small network."""
    sharded: bool = True
    """Whether the stage shards it if the strategy has a device mesh."""


class PlannedPhase(NamedTuple):
    """A completed forward and backward pass."""

    name: str
    updates: tuple[str, ...]
    """Networks whose optimizers step now, after which their gradients are freed."""


@runtime_checkable
class Plannable(Protocol):
    """A stage that supports the memory plan."""

    def plan_networks(self) -> list[PlannedNetwork]:
        """All networks on the device except the family's (text encoders, VAE); called after `configure_model`."""

    def plan_step(self, batch: TrainingBatch) -> Iterator[PlannedPhase]:
        """Runs the most expensive training step, and yields after each backward pass.

        Tensors are on the meta device, with real shapes and dtypes but no values. No optimizer is stepped. `manual_backward`
        works as in training.
        """
