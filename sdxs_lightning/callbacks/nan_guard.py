"""Stops a run with NaN or infinite values before it overwrites its good checkpoints."""

from collections.abc import Iterable
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
    """Checks logged losses and gradient norms for NaN and infinity, and the weights before each checkpoint.

    The first iteration at which a watched scalar is not finite is recorded on the device after each batch, without
    synchronising. The records are copied to the host every n batches and before each checkpoint.

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
        self._stop_if(trainer, problem)

    def check_weights(self, trainer: pl.Trainer) -> None:
        """Stops all ranks if a weight is not finite. A collective; one pass over all weights.

        Raises:
            TrainingDiverged: with the student update, the network and the last good checkpoint.
        """
        bad = _networks_with_bad_weights(trainer.lightning_module.named_parameters())
        problem = None
        if bad:
            problem = f"weights of the {', '.join(bad)} are NaN or infinite at student update {counts_of(trainer).updates}"
        self._stop_if(trainer, problem)

    def _stop_if(self, trainer: pl.Trainer, problem: str | None) -> None:
        problem = self.ranks.first_message(problem)
        if problem is None:
            return
        saver = next((one for one in trainer.checkpoint_callbacks if isinstance(one, KnowsLastGood)), None)
        good = saver.last_good(trainer) if saver else "checkpoints were not kept"
        raise TrainingDiverged(
            f"the training diverged: {problem}; {good}. Before going on from there lower the learning rate of that network "
            "or its gradient_clip_norm, or use 32-bit precision."
        )


def check_before_saving(trainer: pl.Trainer) -> None:
    """Runs every guard's checks before a checkpoint, so that bad weights never replace good ones."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
    for callback in callbacks:
        if isinstance(callback, NanGuard):
            callback.read(trainer)
            callback.check_weights(trainer)


def _networks_with_bad_weights(named: Iterable[tuple[str, Tensor]]) -> list[str]:
    tensors: dict[str, list[Tensor]] = {}
    for name, parameter in named:
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if local.numel():  # a rank's share of a sharded weight may be empty
            tensors.setdefault(name.partition(".")[0], []).append(local.detach())
    # The largest magnitude is finite exactly if all are; a sum of squares could overflow.
    worst = {
        network: torch.stack([norm.float() for norm in torch._foreach_norm(weights, float("inf"))]).max()
        for network, weights in tensors.items()
    }
    return [network for network, value in worst.items() if not torch.isfinite(value)]
