"""The hardware of a configuration: processes, sharding, precision, device memory."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sdxs_lightning.core.errors import UserError
from sdxs_lightning.training.sharding import REPLICATE, SHARD, ShardedNetworks, mesh_shape

GIB = 2**30
ASSUMED_GPUS = 8
ASSUMED_GIB = 80.0
CUDA_CONTEXT = 3 * GIB // 4
"""CUDA's context and cuBLAS/cuDNN workspaces: an allowance."""
NCCL = GIB
"""Communication channels of NCCL: an allowance."""

_PRECISIONS = {
    None: "32-true",
    32: "32-true",
    "32": "32-true",
    16: "16-mixed",
    "16": "16-mixed",
    "bf16": "bf16-mixed",
}
_AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
_WEIGHTS = {"bf16-true": torch.bfloat16, "16-true": torch.float16}


@dataclass(frozen=True)
class Hardware:
    """The hardware of a run."""

    processes: int
    """Number of processes on all machines, one per device."""
    strategy: str
    """"one device", "ddp", "fsdp2" or "hsdp"."""
    precision: str
    """The Trainer's precision: "32-true", "bf16-mixed", ..."""
    on_gpu: bool
    memory: int
    """Memory of one device in bytes."""
    memory_source: str
    """Where `memory` comes from."""
    assumed: str | None = None
    """Assumption about a setting that the configuration leaves to the machine."""
    shards: int = 1
    """Number of processes among which each network is sharded."""

    @property
    def replicas(self) -> int:
        """Number of copies of each network."""
        return self.processes // self.shards

    @property
    def layout(self) -> str:
        """The strategy with its sizes, such as "hsdp on 4 x 8"."""
        sizes = f"{self.replicas} x {self.shards}" if self.strategy == "hsdp" else str(self.processes)
        return f"{self.strategy} on {sizes}" if self.processes > 1 else "one device"

    @property
    def autocast(self) -> torch.dtype | None:
        """The lower dtype of mixed precision; None without autocast."""
        return _AUTOCAST.get(self.precision)

    @property
    def weights(self) -> torch.dtype | None:
        """The dtype of all weights; None keeps the dtypes as loaded."""
        return _WEIGHTS.get(self.precision)

    @property
    def gathered(self) -> torch.dtype | None:
        """The dtype in which FSDP2 gathers, as in `training.sharding.mixed_precision`."""
        return torch.bfloat16 if self.precision == "bf16-mixed" else None

    @property
    def allowance(self) -> int:
        """Bytes that are not allocated for tensors."""
        if not self.on_gpu:
            return 0
        return CUDA_CONTEXT + (NCCL if self.processes > 1 else 0)


def read_hardware(trainer: Mapping[str, Any], gpu_gib: float | None = None) -> Hardware:
    """Reads the hardware from a `trainer` section.

    Args:
        trainer: accelerator, devices, num_nodes, strategy, precision as parsed.
        gpu_gib: memory of a device; None takes this machine's, or 80 GiB.

    Raises:
        UserError: for an unsupported strategy or precision, or a memory that is not positive.
    """
    on_gpu = str(trainer.get("accelerator", "auto")) != "cpu"
    per_machine, assumed = _devices(trainer.get("devices", "auto"), on_gpu)
    machines = int(trainer.get("num_nodes") or 1)
    processes = per_machine * machines
    memory, source = _memory(on_gpu, gpu_gib)
    precision = trainer.get("precision")
    precision = _PRECISIONS.get(precision, str(precision))
    known = ("32-true", *_AUTOCAST, *_WEIGHTS)
    if precision not in known:
        raise UserError(f"--plan does not know trainer.precision {precision!r}; it knows {', '.join(known)}.")
    strategy, shards = _strategy(trainer.get("strategy", "auto"), processes, machines)
    return Hardware(processes, strategy, precision, on_gpu, memory, source, assumed, shards)


def _devices(devices: Any, on_gpu: bool) -> tuple[int, str | None]:
    if isinstance(devices, str) and devices.strip().lstrip("-").isdigit():
        devices = int(devices)
    if isinstance(devices, list | tuple):
        return len(devices), None
    if isinstance(devices, str) and "," in devices:
        return len([part for part in devices.split(",") if part.strip()]), None
    if isinstance(devices, int) and devices > 0:
        return devices, None
    if not on_gpu:
        return 1, None
    if torch.cuda.is_available():
        return torch.cuda.device_count(), None
    return ASSUMED_GPUS, (
        f"trainer.devices is {devices!r} and there is no GPU here, so {ASSUMED_GPUS} per machine are assumed; "
        "set --trainer.devices"
    )


def _memory(on_gpu: bool, gpu_gib: float | None) -> tuple[int, str]:
    if gpu_gib is not None:
        if gpu_gib <= 0:
            raise UserError(f"--plan_gpu_gb must be above 0, got {gpu_gib}.")
        return int(gpu_gib * GIB), "--plan_gpu_gb"
    if not on_gpu:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "this machine's memory"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0)
        return int(device.total_memory), device.name
    return int(ASSUMED_GIB * GIB), "assumed; set --plan_gpu_gb"


def _strategy(strategy: Any, processes: int, machines: int) -> tuple[str, int]:
    """The strategy, and its number of shards."""
    if isinstance(strategy, str):
        if strategy == "auto" or strategy.startswith("ddp"):
            return ("ddp" if processes > 1 or strategy != "auto" else "one device"), 1
        name = strategy
    else:
        name = str(strategy.get("class_path"))
        module, _, attribute = name.rpartition(".")
        found = getattr(importlib.import_module(module), attribute, None) if module else None
        if isinstance(found, type) and issubclass(found, ShardedNetworks):
            init_args = strategy.get("init_args") or {}
            sizes = init_args.get(REPLICATE, 1), init_args.get(SHARD, "auto")
            replicas, shards = mesh_shape(*sizes, processes, machines)
            return ("hsdp" if replicas > 1 else "fsdp2"), shards
        if isinstance(found, type) and found.__name__ == "DDPStrategy":
            return "ddp", 1
    raise UserError(
        f"--plan does not know the memory of trainer.strategy {name!r}; it knows auto, ddp and "
        "sdxs_lightning.training.sharding.ShardedNetworks."
    )
