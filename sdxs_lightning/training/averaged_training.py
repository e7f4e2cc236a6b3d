"""One network, one optimizer, an average of the weights, Lightning's own optimisation: what such stages share."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.optim import Optimizer

from sdxs_lightning.training.gradients import clip_gradients


class AveragedTraining(LightningModule):
    """Base of the stages that train a single network; accumulation, clipping and the end of the run are the Trainer's.

    Args:
        optimizer: from parameters to optimizer.
        lr_scheduler: from optimizer to a schedule that is stepped once per step of the optimizer; None keeps the rate.
    """

    log_prefix = "train/"

    def __init__(self, optimizer: OptimizerCallable, lr_scheduler: LRSchedulerCallable | None) -> None:
        super().__init__()
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler

    @property
    def learner(self) -> nn.Module:
        """The network that learns."""
        raise NotImplementedError

    def average(self) -> None:
        """Moves the average towards the learner."""
        raise NotImplementedError

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer of the learner, with its schedule where there is one."""
        optimizer = self.optimizer(self.learner.parameters())
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
        """Clips by the norm, which is logged, clipped or not.

        Raises:
            ValueError: for clipping by value.
        """
        if gradient_clip_algorithm == "value":
            raise ValueError(
                "gradients are clipped by their norm; take trainer.gradient_clip_algorithm: value out."
            )
        norm = clip_gradients(self.learner.parameters(), gradient_clip_val)
        self.log(f"{self.log_prefix}gradient_norm", norm)
        self.log(f"{self.log_prefix}lr", optimizer.param_groups[0]["lr"])

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Steps, then averages: callbacks that save after the batch find both done."""
        super().optimizer_step(*args, **kwargs)
        self.average()
