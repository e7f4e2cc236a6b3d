"""Stops a run with NaN or infinite values before it overwrites its good checkpoints."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.distributed.tensor import DTensor

from sdxs_lightning.callbacks.counts import counts_of
from sdxs_lightning.callbacks.ranks import Ranks
from sdxs_lightning.core.errors import TrainingDiverged

NEVER = torch.iinfo(torch.int64).max


@runtime_checkable
class KnowsLastGood(Protocol):
    """The checkpointing callback; a protocol, because that callback imports this module."""

    def last_good(self, trainer: pl.Trainer) -> str:
        """Names the newest complete checkpoint, for error messages."""


class NanGuard(Callback):
    """Checks logged losses and gradient norms for NaN and infinity, and the weights of each checkpoint.

    The first iteration at which a watched scalar is not finite is recorded on the device after each batch, without
    synchronising. The records are copied to the host every n batches and before each checkpoint. The weights are checked as
    they are written, by the thread that writes them: a checkpoint with a bad one is never complete, and ends the run.

    Args:
        read_every_n_batches: interval between readings, which synchronise; a diverged run continues for at most this long.
        watch: suffixes of the logged names to check. The part of a name before the slash is the network.

    Raises:
        ValueError: unless read_every_n_batches is at least 1.
    """

    def __init__(
        self, read_every_n_batches: int = 50, watch: tuple[str, ...] = ("loss", "gradient_norm")
    ) -> None:
        if read_every_n_batches < 1:
            raise ValueError(f"NanGuard.read_every_n_batches must be 1 or more, got {read_every_n_batches}.")
        self.read_every_n_batches = read_every_n_batches
        self.watch = tuple(watch)
        self.ranks = Ranks()
        self._first_bad: dict[str, Tensor] = {}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Records after each batch, and reads every n batches."""
        iteration = counts_of(trainer).iterations
        for name, value in trainer.callback_metrics.items():
            if name.endswith(self.watch):
                self._record(name, value, iteration)
        if (batch_idx + 1) % self.read_every_n_batches == 0:
            self.read(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reads before the final checkpoint and the export."""
        self.read(trainer)

    def _record(self, name: str, value: Tensor, iteration: int) -> None:
        now = torch.where(torch.isfinite(value.detach()), NEVER, iteration)
        before = self._first_bad.get(name)
        self._first_bad[name] = now if before is None else torch.minimum(before, now)

    def read(self, trainer: pl.Trainer) -> None:
        """Stops all ranks if any of them recorded a non-finite value. A collective.

        Raises:
            TrainingDiverged: with the iteration, the network and the last good checkpoint.
        """
        problem = None
        if self._first_bad:
            iterations = torch.stack(
                [iteration.reshape(()) for iteration in self._first_bad.values()]
            ).tolist()
            iteration, name = min(zip(iterations, self._first_bad, strict=True))
            if iteration != NEVER:
                problem = (
                    f"{name} of the {name.partition('/')[0]} is NaN or infinite since iteration {iteration} (student update "
                    f"{counts_of(trainer).updates} now)"
                )
        problem = self.ranks.first_message(problem)
        if problem is not None:
            raise diverged(trainer, problem)


def diverged(trainer: pl.Trainer, problem: str) -> TrainingDiverged:
    """The error that ends the run."""
    saver = next((one for one in trainer.checkpoint_callbacks if isinstance(one, KnowsLastGood)), None)
    good = saver.last_good(trainer) if saver else "checkpoints were not kept"
    return TrainingDiverged(
        f"the training diverged: {problem}; {good}. Before going on from there lower the learning rate of that network "
        "or its gradient_clip_norm, or use 32-bit precision."
    )


def read_guards(trainer: pl.Trainer) -> bool:
    """Reads every guard's records before a checkpoint; whether there is a guard, for which its weights are to be checked.

    Raises:
        TrainingDiverged: as `NanGuard.read`.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
    guards = [callback for callback in callbacks if isinstance(callback, NanGuard)]
    for guard in guards:
        guard.read(trainer)
    return bool(guards)


def networks_with_bad_weights(state: Mapping[str, Any]) -> list[str]:
    """The networks, by the first part of their names, with a NaN or infinity in a `state_dict`; of a shard on this rank."""
    tensors: dict[str, list[Tensor]] = {}
    for name, value in state.items():
        local = value.to_local() if isinstance(value, DTensor) else value
        # A rank's share of a sharded weight may be empty.
        if isinstance(local, Tensor) and local.is_floating_point() and local.numel():
            tensors.setdefault(name.partition(".")[0], []).append(local.detach())
    # Both ends of a range are finite exactly if all values are (NaN is passed on); a sum could overflow. On a CPU this runs at
    # the speed of the memory, a tenth of the time of the infinity norm or of isfinite.
    ends = {
        network: torch.stack([end.float() for one in weights for end in one.aminmax()])
        for network, weights in tensors.items()
    }
    return [network for network, values in ends.items() if not torch.isfinite(values).all()]
