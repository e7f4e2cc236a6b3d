"""Manual optimisation of several networks: what such stages share, so that a training step shows its method only.

A *micro-batch* is one batch of the loader. An *iteration* is `accumulate_grad_batches` of them; on its last one the optimizers
step. Lightning refuses its own accumulation and clipping under manual optimisation, and its `global_step` counts the steps
of all optimizers together, so a stage counts by itself.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LRScheduler

from sdxs_lightning.networks.network import Network
from sdxs_lightning.training.gradients import average_gradients, clip_gradients


class ManualOptimization(LightningModule):
    """Base of the stages that train several networks, each with its own optimizer.

    Args:
        accumulate_grad_batches: micro-batches of an iteration; their gradients are averaged.
        gradient_clip_norm: of each network by itself; None does not clip.

    Raises:
        ValueError: unless accumulate_grad_batches is at least 1.
    """

    def __init__(self, accumulate_grad_batches: int, gradient_clip_norm: float | None) -> None:
        super().__init__()
        if accumulate_grad_batches < 1:
            raise ValueError(f"accumulate_grad_batches must be 1 or more, got {accumulate_grad_batches}.")
        self.automatic_optimization = False
        self.accumulate_grad_batches = accumulate_grad_batches
        self.gradient_clip_norm = gradient_clip_norm
        self.iterations = 0
        """Iterations completed; in the checkpoint."""
        self.micro_batches = 0
        """Micro-batches of the iteration under way."""
        self._scalars: dict[str, list[Tensor | float]] = defaultdict(list)
        self._scheduled: list[str] = []

    @property
    def networks(self) -> dict[str, Network]:
        """The networks that learn, by role."""
        raise NotImplementedError

    @property
    def iteration_is_ending(self) -> bool:
        """Whether this micro-batch is the last of its iteration."""
        return self.micro_batches + 1 == self.accumulate_grad_batches

    def without_reducer(self) -> AbstractContextManager[None]:
        """Around all backward passes: disables DDP's reducer, since `apply_update` averages over ranks.

        FSDP2 scatters gradients on every micro-batch; deferring that would keep unsharded gradients in memory.
        """
        model = self.trainer.model
        if isinstance(model, DistributedDataParallel):
            return cast(AbstractContextManager[None], model.no_sync())
        return nullcontext()

    def accumulate(self, loss: Tensor) -> None:
        """Backward of this micro-batch's share of the iteration's mean loss."""
        self.manual_backward(loss / self.accumulate_grad_batches)

    def apply_update(self, role: str) -> None:
        """Averages gradients over ranks, clips, steps, zeroes them, steps the scheduler: the one place where weights change."""
        optimizer, network = self._optimizer_of(role), self.networks[role]
        if isinstance(self.trainer.model, DistributedDataParallel) or self.device_mesh is not None:
            # FSDP2 has averaged what it shards while scattering it; what it does not shard is averaged here.
            average_gradients(p for p in network.parameters() if not isinstance(p, DTensor))
        norm = clip_gradients(network.parameters(), self.gradient_clip_norm)
        self.note(f"{role}/", gradient_norm=norm, lr=optimizer.param_groups[0]["lr"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if role in self._scheduled:
            self._scheduler_of(role).step()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Forgets the scalars that a row of the log has shown.

        Lightning keeps what was logged until it is logged again, and would write it into every later row, also where an
        iteration did not compute it. A row holds what was computed since the row before it, and nothing older.
        """
        results, every = self.trainer._results, self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if results is None or every == 0 or self.trainer.fit_loop.epoch_loop._batches_that_stepped % every:
            return
        for key in [key for key, result in results.items() if not result.meta.on_epoch]:
            del results[key]

    def note(self, prefix: str = "", **scalars: Tensor | float) -> None:
        """Collects scalars for the iteration's row in the log; tensors stay on the device."""
        for name, value in scalars.items():
            self._scalars[prefix + name].append(value.detach() if isinstance(value, Tensor) else value)

    def end_micro_batch(self, **counters: int) -> None:
        """Counts, and logs each complete iteration: means over its micro-batches, and the stage's own counters."""
        self.micro_batches += 1
        if self.micro_batches < self.accumulate_grad_batches:
            return
        self.micro_batches = 0
        self.iterations += 1
        line = {name: _mean(values) for name, values in self._scalars.items()}
        self._scalars.clear()
        line |= {name: float(count) for name, count in (counters | {"iterations": self.iterations}).items()}
        self.log_dict(line)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Each network's own, in the order of `networks`."""
        configured = {
            role: cast(dict[str, Any], network.configure_optimizers())
            for role, network in self.networks.items()
        }
        self._scheduled = [role for role, config in configured.items() if "lr_scheduler" in config]
        schedulers = [configured[role]["lr_scheduler"] for role in self._scheduled]
        return [config["optimizer"] for config in configured.values()], schedulers

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the counters. Random state is not needed, since noise has addresses."""
        if self.micro_batches:
            rank_zero_warn(
                f"This checkpoint was taken {self.micro_batches} micro-batch(es) into an iteration; it lacks their gradients."
            )
        checkpoint["iterations"] = self.iterations

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores the counters."""
        # "turns" until version 0.1.
        self.iterations = checkpoint["iterations"] if "iterations" in checkpoint else checkpoint["turns"]

    def _optimizer_of(self, role: str) -> LightningOptimizer:
        optimizers = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        return optimizers[list(self.networks).index(role)]

    def _scheduler_of(self, role: str) -> LRScheduler:
        return self.trainer.lr_scheduler_configs[self._scheduled.index(role)].scheduler


def _mean(values: list[Tensor | float]) -> Tensor | float:
    tensors = [value for value in values if isinstance(value, Tensor)]
    return torch.stack(tensors).mean() if tensors else values[-1]
