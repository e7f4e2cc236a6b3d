"""Size of a stage's checkpoints, and the disk and host memory that they need."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor

from sdxs_lightning.core.disk_room import free_bytes
from sdxs_lightning.memory_plan.network_bytes import network_bytes
from sdxs_lightning.training.plannable import Plannable, PlannedNetwork


@dataclass(frozen=True)
class CheckpointBytes:
    """Bytes of one checkpoint. Manifest, names and counters (some hundred kilobytes) are not counted."""

    weights: int
    """Weights and buffers in the `state_dict`, without averages."""
    averages: int
    """Averaged weights (EMA)."""
    optimizers: int
    """States of the optimizers."""

    @property
    def total(self) -> int:
        return self.weights + self.averages + self.optimizers

    def stored(self, averages_in_bfloat16: bool) -> int:
        """Bytes on disk, with averages and optimizer states as saved by `averages_in_bfloat16` of Checkpointing.

        Exact for float32 weights.
        """
        return self.weights + (self.averages + self.optimizers) // 2 if averages_in_bfloat16 else self.total


@dataclass(frozen=True)
class CheckpointFolder:
    """What one callback writes into one folder, and the room there."""

    path: str
    checkpoint: int
    """Bytes of one checkpoint."""
    keep: int
    """Number of complete checkpoints that are kept."""
    free: int
    """Free bytes of the file system; -1 if it cannot be read."""
    asynchronous: bool
    """Whether one checkpoint is held in host memory while it is written."""

    @property
    def needed(self) -> int:
        """Bytes with one more checkpoint, which is written before the oldest is removed."""
        return (self.keep + 1) * self.checkpoint

    @property
    def fits(self) -> bool:
        """Whether an empty folder would have the room."""
        return self.free < 0 or self.needed <= self.free


def checkpoint_bytes(
    stage: LightningModule, networks: Sequence[PlannedNetwork] | None = None
) -> CheckpointBytes:
    """Counts a built stage's checkpoint, all shards together; on any device, also on meta.

    Args:
        stage: a `Plannable` stage.
        networks: its `plan_networks()`, if known.
    """
    assert isinstance(stage, Plannable)
    networks = stage.plan_networks() if networks is None else networks
    state = stage.state_dict(keep_vars=True)  # the parameters themselves, which `averaged_names` compares
    averaged = averaged_names(stage, networks)
    distinct = {id(tensor): (name, tensor) for name, tensor in state.items() if isinstance(tensor, Tensor)}
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in distinct.values()}
    averages = sum(size for name, size in sizes.items() if name in averaged)
    return CheckpointBytes(
        weights=sum(sizes.values()) - averages,
        averages=averages,
        optimizers=sum(network_bytes(one, 1).optimizer for one in networks if one.role == "trained"),
    )


def averaged_names(stage: LightningModule, networks: Sequence[PlannedNetwork]) -> frozenset[str]:
    """Names in the stage's `state_dict` of averaged parameters; buffers, such as a noise schedule, are none."""
    of_role: dict[str, set[int]] = {"averaged": set(), "trained": set()}
    for one in networks:
        of_role.get(one.role, set()).update(id(parameter) for parameter in one.module.parameters())
    only_averaged = of_role["averaged"] - of_role["trained"]
    named = stage.named_parameters(remove_duplicate=False)
    return frozenset(name for name, parameter in named if id(parameter) in only_averaged)


def checkpoint_folders(
    size: CheckpointBytes, callbacks: Any, default_root_dir: str | None
) -> list[CheckpointFolder]:
    """The folders that the callbacks of a configuration write checkpoints to.

    Args:
        size: of a checkpoint.
        callbacks: the section `trainer.callbacks`, as plain values.
        default_root_dir: of the Trainer.
    """
    root = Path(default_root_dir or ".")
    return [
        CheckpointFolder(
            path=str(arguments.get("folder") or root / kind.checkpoints_in),
            checkpoint=size.stored(bool(arguments.get("averages_in_bfloat16"))),
            keep=int(arguments.get("keep", 1)),
            free=free_bytes(Path(arguments.get("folder") or root)),
            asynchronous=bool(arguments.get("asynchronous")),
        )
        for kind, arguments in _savers(callbacks)
    ]


def _savers(callbacks: Any) -> Iterator[tuple[Any, Mapping[str, Any]]]:
    """Callbacks that save checkpoints, which have a class attribute `checkpoints_in`, with their arguments."""
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        path = callback.get("class_path", "") if isinstance(callback, Mapping) else ""
        module, _, name = path.rpartition(".")
        kind = getattr(importlib.import_module(module), name, None) if module else None
        if hasattr(kind, "checkpoints_in"):
            yield kind, callback.get("init_args") or {}
