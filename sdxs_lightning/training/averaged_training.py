"""Base of the stages that train one network, with averaged weights, by Lightning's automatic optimisation."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.optim import Optimizer

from sdxs_lightning.training.gradients import check_clip_norm, clip_gradients


class AveragedTraining(LightningModule):
    """Base of the stages that train a single network; the Trainer handles accumulation, clipping and the end of the run.

    Args:
        optimizer: called with the network's trainable parameters.
        lr_scheduler: called with the optimizer, stepped once per optimizer step; None keeps the rate constant.
    """

    log_prefix = "train/"

    def __init__(self, optimizer: OptimizerCallable, lr_scheduler: LRSchedulerCallable | None) -> None:
        super().__init__()
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler

    @property
    def learner(self) -> nn.Module:
        raise NotImplementedError

    def average(self) -> None:
        """Updates the averaged weights."""
        raise NotImplementedError

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = self.optimizer(p for p in self.learner.parameters() if p.requires_grad)
        if self.lr_scheduler is None:
            return {"optimizer": optimizer}
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.lr_scheduler(optimizer), "interval": "step"},
        }

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips by norm, and logs the norm before clipping.

        Raises:
            ValueError: if gradient_clip_algorithm is "value", or gradient_clip_val not above 0.
        """
        if gradient_clip_algorithm == "value":
            raise ValueError(
                "gradients are clipped by their norm; take trainer.gradient_clip_algorithm: value out."
            )
        check_clip_norm("trainer.gradient_clip_val", gradient_clip_val)
        norm = clip_gradients(self.learner.parameters(), gradient_clip_val)
        self.log(f"{self.log_prefix}gradient_norm", norm)
        # On the host: Lightning would copy a number to the device, and wait there for all that the GPU has to do.
        self.log(f"{self.log_prefix}lr", torch.tensor(float(optimizer.param_groups[0]["lr"])))

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Steps, then averages, so that callbacks which save after the batch save the updated average."""
        super().optimizer_step(*args, **kwargs)
        self.average()
