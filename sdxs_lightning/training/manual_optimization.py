"""Base of the stages that train several networks by Lightning's manual optimisation.

A *micro-batch* is one batch of the loader. An *iteration* is `accumulate_grad_batches` of them; the optimizers step on the
last one. With manual optimisation Lightning does not accumulate or clip, and its `global_step` counts the steps of all
optimizers together, so the stage keeps its own counters.
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
        accumulate_grad_batches: micro-batches per iteration; their gradients are averaged.
        gradient_clip_norm: maximum gradient norm, per network; None does not clip.

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
        """Completed iterations; saved in checkpoints."""
        self.micro_batches = 0
        """Micro-batches done in the current iteration."""
        self._scalars: dict[str, list[Tensor | float]] = defaultdict(list)
        self._scheduled: list[str] = []

    @property
    def networks(self) -> dict[str, Network]:
        """The trained networks by role."""
        raise NotImplementedError

    @property
    def iteration_kind(self) -> tuple[str, int]:
        """Name of the current iteration's kind, for logs ("" if all are alike), and what else its work depends on."""
        return "", 0

    @property
    def iteration_is_ending(self) -> bool:
        """Whether this is the last micro-batch of its iteration."""
        return self.micro_batches + 1 == self.accumulate_grad_batches

    def without_reducer(self) -> AbstractContextManager[None]:
        """Context for all backward passes that disables DDP's reducer, since `apply_update` averages over ranks.

        FSDP2 still reduce-scatters on every micro-batch; deferring that would keep unsharded gradients in memory.
        """
        model = self.trainer.model
        if isinstance(model, DistributedDataParallel):
            return cast(AbstractContextManager[None], model.no_sync())
        return nullcontext()

    def accumulate(self, loss: Tensor) -> None:
        """Backward pass, with the loss divided by the number of micro-batches per iteration."""
        self.manual_backward(loss / self.accumulate_grad_batches)

    def apply_update(self, role: str) -> None:
        """Averages gradients over ranks, clips, steps, zeroes them, steps the scheduler. Weights change nowhere else."""
        optimizer, network = self._optimizer_of(role), self.networks[role]
        if isinstance(self.trainer.model, DistributedDataParallel) or self.device_mesh is not None:
            # FSDP2 has already averaged the gradients of sharded parameters.
            average_gradients(p for p in network.parameters() if not isinstance(p, DTensor))
        norm = clip_gradients(network.parameters(), self.gradient_clip_norm)
        self.note(f"{role}/", gradient_norm=norm, lr=optimizer.param_groups[0]["lr"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if role in self._scheduled:
            self._scheduler_of(role).step()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Clears the scalars that have been written to the log.

        Lightning keeps logged values and would repeat them in every later row until they are logged again; a row should
        hold only values computed since the previous row.
        """
        results, every = self.trainer._results, self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if results is None or every == 0 or self.trainer.fit_loop.epoch_loop._batches_that_stepped % every:
            return
        for key in [key for key, result in results.items() if not result.meta.on_epoch]:
            del results[key]

    def note(self, prefix: str = "", **scalars: Tensor | float) -> None:
        """Collects scalars to log at the end of the iteration; tensors stay on the device."""
        for name, value in scalars.items():
            self._scalars[prefix + name].append(value.detach() if isinstance(value, Tensor) else value)

    def end_micro_batch(self, **counters: int) -> None:
        """Advances the counters; logs each completed iteration, with means over micro-batches and the given counters."""
        self.micro_batches += 1
        if self.micro_batches < self.accumulate_grad_batches:
            return
        self.micro_batches = 0
        self.iterations += 1
        line = {name: _mean(values) for name, values in self._scalars.items()}
        self._scalars.clear()
        line |= counters | {"iterations": self.iterations}
        self.log_dict({name: _as_tensor(value) for name, value in line.items()})

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The networks' optimizers and schedulers, in the order of `networks`."""
        configured = {
            role: cast(dict[str, Any], network.configure_optimizers())
            for role, network in self.networks.items()
        }
        self._scheduled = [role for role, config in configured.items() if "lr_scheduler" in config]
        schedulers = [configured[role]["lr_scheduler"] for role in self._scheduled]
        return [config["optimizer"] for config in configured.values()], schedulers

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the iteration counter. No random state is needed, since noise is a function of seed and position."""
        if self.micro_batches:
            rank_zero_warn(
                f"This checkpoint was taken {self.micro_batches} micro-batch(es) into an iteration; it lacks their gradients."
            )
        checkpoint["iterations"] = self.iterations

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Named "turns" until version 0.1.
        self.iterations = checkpoint["iterations"] if "iterations" in checkpoint else checkpoint["turns"]

    def _optimizer_of(self, role: str) -> LightningOptimizer:
        optimizers = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        return optimizers[list(self.networks).index(role)]

    def _scheduler_of(self, role: str) -> LRScheduler:
        return self.trainer.lr_scheduler_configs[self._scheduled.index(role)].scheduler


def _as_tensor(value: Tensor | float) -> Tensor:
    """A number stays on the host: Lightning would copy it to the device, and wait there for all that the GPU has to do."""
    return value if isinstance(value, Tensor) else torch.tensor(float(value))


def _mean(values: list[Tensor | float]) -> Tensor | float:
    tensors = [value for value in values if isinstance(value, Tensor)]
    return torch.stack(tensors).mean() if tensors else values[-1]
