"""Base class of the trainings of the toy world's small networks."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor


class ToyTraining(pl.LightningModule):
    """One optimizer over all parameters with a schedule stepped every batch.

    Args:
        optimizer: from parameters to optimizer.
        lr_scheduler: from optimizer to a per-step schedule.
    """

    def __init__(self, optimizer: OptimizerCallable, lr_scheduler: LRSchedulerCallable) -> None:
        super().__init__()
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = self.optimizer(self.parameters())
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.lr_scheduler(optimizer), "interval": "step"},
        }

    def to_network_range(self, images_uint8: Tensor) -> Tensor:
        """(B,3,H,W) uint8 to float32 in [-1, 1]."""
        return images_uint8.float() / 127.5 - 1
