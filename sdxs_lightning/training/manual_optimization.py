"""Base of the stages that train several networks by Lightning's manual optimisation.

A *micro-batch* is one batch of the loader. An *iteration* is `accumulate_grad_batches` of them; the optimizers step on the
last one. With manual optimisation Lightning does not accumulate or clip, and its `global_step` counts the steps of all
optimizers together, so the stage keeps its own counters.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LRScheduler

from sdxs_lightning.networks.network import Network
from sdxs_lightning.training.gradient_average import GradientAverage
from sdxs_lightning.training.gradients import check_clip_norm, clip_gradients
from sdxs_lightning.training.sharding import unsharded_parameters


class ManualOptimization(LightningModule):
    """Base of the stages that train several networks, each with its own optimizer.

    Args:
        accumulate_grad_batches: micro-batches per iteration; their gradients are averaged.
        gradient_clip_norm: maximum gradient norm, per network; None does not clip.

    Raises:
        ValueError: unless accumulate_grad_batches is at least 1 and gradient_clip_norm above 0.
    """

    def __init__(self, accumulate_grad_batches: int, gradient_clip_norm: float | None) -> None:
        super().__init__()
        if accumulate_grad_batches < 1:
            raise ValueError(f"accumulate_grad_batches must be 1 or more, got {accumulate_grad_batches}.")
        check_clip_norm("gradient_clip_norm", gradient_clip_norm)
        self.automatic_optimization = False
        self.accumulate_grad_batches = accumulate_grad_batches
        self.gradient_clip_norm = gradient_clip_norm
        self.iterations = 0
        """Completed iterations; saved in checkpoints."""
        self.micro_batches = 0
        """Micro-batches done in the current iteration."""
        self._scalars: dict[str, list[Tensor | float]] = defaultdict(list)
        self._scheduled: list[str] = []
        self._averages: dict[tuple[str, ...], GradientAverage | None] = {}
        self._unfinished: list[GradientAverage] = []

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
        """Context of a micro-batch that disables DDP's reducer, which sends the gradients of all networks."""
        model = self.trainer.model
        if isinstance(model, DistributedDataParallel):
            return cast(AbstractContextManager[None], model.no_sync())
        return nullcontext()

    def accumulate(self, loss: Tensor, roles: Sequence[str], last: bool | None = None) -> None:
        """Backward pass, with the loss divided by the number of micro-batches per iteration.

        Args:
            loss: scalar.
            roles: the networks that get gradients from it.
            last: whether their next update follows without a further pass, so that gradients are averaged over ranks meanwhile;
                None takes the last micro-batch of the iteration.
        """
        with self._averaging(tuple(roles), self.iteration_is_ending if last is None else last):
            self.manual_backward(loss / self.accumulate_grad_batches)

    def _averaging(self, roles: tuple[str, ...], last: bool) -> AbstractContextManager[None]:
        """Context of a backward pass: averages over ranks in the last one, and nothing travels that can wait before it."""
        strategy = self.trainer.strategy if self._trainer is not None else None
        if not isinstance(strategy, ParallelStrategy) or strategy.world_size == 1:
            return nullcontext()
        if not last:
            return strategy.block_backward_sync()
        if roles not in self._averages:
            # FSDP2 averages the gradients of what it shards.
            whole = [p for role in roles for p in unsharded_parameters(self.networks[role])]
            trained = [parameter for parameter in whole if parameter.requires_grad]
            self._averages[roles] = GradientAverage(trained) if trained else None
        average = self._averages[roles]
        if average is None:
            return nullcontext()
        self._unfinished.append(average)
        return average.overlapping()

    def apply_update(self, role: str) -> None:
        """Waits for the averaged gradients, clips, steps, zeroes them, steps the scheduler. Weights change nowhere else."""
        optimizer = self._optimizer_of(role)
        for average in self._unfinished:
            average.finish()
        self._unfinished.clear()
        # Not network.parameters(), which walks through a thousand modules each time.
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norm = clip_gradients(trained, self.gradient_clip_norm)
        self.note(f"{role}/", gradient_norm=norm, lr=optimizer.param_groups[0]["lr"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if role in self._scheduled:
            self._scheduler_of(role).step()

    def forget_moments(self, role: str) -> None:
        """Lets an optimizer's next step be as its first: for a loss whose gradients are of another size."""
        self._optimizer_of(role).state.clear()

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
