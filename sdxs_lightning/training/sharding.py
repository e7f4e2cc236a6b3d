"""FSDP2 and HSDP per network: the strategy, and the sharding functions that stages call in `configure_model`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.optim import Optimizer

from sdxs_lightning.core.errors import UserError

REPLICATE, SHARD = "data_parallel_replicate", "data_parallel_shard"
"""Names of the device mesh's axes, and of the options."""


class ShardedNetworks(ModelParallelStrategy):
    """FSDP2 on every network by itself, over all processes; or hybrid (HSDP): sharded in groups, and replicated across them.

    With HSDP weights are gathered and gradients scattered within a group, by default the GPUs of one machine. Across the
    groups only gradients travel, once per update. Checkpoints do not depend on the layout.

    Args:
        data_parallel_replicate: number of groups, each of which holds every network once; 1 is FSDP2, "auto" as many as
            data_parallel_shard leaves, and one per machine if that is "auto" too.
        data_parallel_shard: number of processes per group, of consecutive ranks; "auto" is as many as data_parallel_replicate
            leaves.
        save_distributed_checkpoint: every rank writes its shard into a folder; False gathers one file on rank 0.
        process_group_backend: None takes nccl on GPUs and gloo on CPUs.

    Raises:
        UserError: if the two sizes do not make up the number of processes.
    """

    def __init__(
        self,
        data_parallel_replicate: int | Literal["auto"] = 1,
        data_parallel_shard: int | Literal["auto"] = "auto",
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
    ) -> None:
        super().__init__(
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
        )
        self.data_parallel_replicate = data_parallel_replicate
        self.data_parallel_shard = data_parallel_shard
        self._networks: list[FSDPModule] = []

    @property
    def mesh_shape(self) -> tuple[int, int]:
        """Number of replicas, and of shards of each."""
        return mesh_shape(
            self.data_parallel_replicate,
            self.data_parallel_shard,
            processes=self.num_nodes * self.num_processes,
            machines=self.num_nodes,
        )

    def _configure_launcher(self) -> None:
        # In the Trainer's constructor: refuses wrong sizes before any process is started.
        _ = self.mesh_shape
        super()._configure_launcher()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The state on its device, in shards; Lightning's copies it to pageable host memory, and `Checkpointing` once more."""
        if not self._save_distributed_checkpoint:
            return super().lightning_module_state_dict()
        assert self.model is not None
        return get_model_state_dict(self.model)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's state on its device, in shards."""
        if not self._save_distributed_checkpoint:
            return super().optimizer_state(optimizer)
        assert self.model is not None
        wrapped = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return dict(get_optimizer_state_dict(self.model, wrapped))

    def setup_environment(self) -> None:
        """Joins the process group and creates the device mesh: one axis for FSDP2, two for HSDP.

        Lightning's own mesh has a data-parallel and a tensor-parallel axis; these networks do not use the latter.
        """
        self._setup_distributed()
        replicas, shards = self.mesh_shape
        shape, names = ((shards,), (SHARD,)) if replicas == 1 else ((replicas, shards), (REPLICATE, SHARD))
        self._device_mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=names)
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = self._device_mesh

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    def setup(self, trainer: Trainer) -> None:
        """Sets up model and optimizers, and fixes FSDP2's dtypes while every trained parameter requires gradients.

        FSDP2 does so in a network's first forward pass. That of the fake score may come under the student's update, where it
        is frozen; torch 2.11 then finds no dtype to reduce in, and its first gradients arrive in bfloat16 for float32 weights
        (pytorch issue 186998).
        """
        super().setup(trainer)
        self._networks = self._find_networks()
        for network in self._networks:
            network._get_fsdp_state()._lazy_init()

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Context of a backward pass after which more gradients are accumulated: none travel between the groups.

        FSDP2 scatters the gradients of every pass within a group, and adds them up there; keeping them whole would need more
        memory than sharding saves.
        """
        if self.device_mesh.ndim == 1:
            yield
            return
        self._require_all_reduce(False)
        try:
            yield
        finally:
            self._require_all_reduce(True)

    def _require_all_reduce(self, required: bool) -> None:
        for network in self._networks:
            network.set_requires_all_reduce(required)

    def _find_networks(self) -> list[FSDPModule]:
        """The sharded networks, without the blocks that are sharded within them."""
        assert self.lightning_module is not None
        networks: list[FSDPModule] = []
        inner: set[nn.Module] = set()
        for module in self.lightning_module.modules():  # outer modules come before inner ones
            if isinstance(module, FSDPModule) and module not in inner:
                networks.append(module)
                inner.update(module.modules())
        return networks


def mesh_shape(
    data_parallel_replicate: int | Literal["auto"],
    data_parallel_shard: int | Literal["auto"],
    processes: int,
    machines: int,
) -> tuple[int, int]:
    """Number of replicas of each network, and of shards of a replica.

    Args:
        data_parallel_replicate: as in `ShardedNetworks`.
        data_parallel_shard: as in `ShardedNetworks`.
        processes: number of processes on all machines.
        machines: number of machines.

    Raises:
        UserError: if the sizes do not make up the number of processes.
    """
    if isinstance(data_parallel_replicate, int):
        replicas = data_parallel_replicate
    elif isinstance(data_parallel_shard, int):
        replicas = max(1, processes // max(1, data_parallel_shard))
    else:
        replicas = machines
    left = max(1, processes // max(1, replicas))
    shards = data_parallel_shard if isinstance(data_parallel_shard, int) else left
    if replicas < 1 or shards < 1 or replicas * shards != processes:
        raise UserError(
            f"trainer.strategy.init_args has {REPLICATE} {data_parallel_replicate} and {SHARD} {data_parallel_shard}, and the "
            f"run {processes} processes on {machines} machine(s): the two multiplied must be the number of processes; change "
            "one of them and leave the other 'auto', or change trainer.devices and trainer.num_nodes."
        )
    if replicas > 1 and shards == 1:
        raise UserError(
            f"{REPLICATE} {data_parallel_replicate} leaves nothing to shard among {processes} processes on {machines} "
            "machine(s); take --config configs/hardware/ddp.yaml, which replicates without sharding, or a smaller "
            f"{REPLICATE}."
        )
    return replicas, shards


def mixed_precision(precision: str) -> MixedPrecisionPolicy:
    """FSDP2's mixed precision policy for a Trainer's `precision`, with float32 master weights.

    With "bf16-mixed" weights are gathered as bfloat16, half the traffic of casting afterwards; gradients are reduced in
    float32.
    """
    if precision == "bf16-mixed":
        # Inputs are left to autocast: FSDP2 would round SDXL's add_time_ids, and bfloat16 cannot tell 1023 px from 1024 px.
        return MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    return MixedPrecisionPolicy()


def sharding_of(stage: LightningModule) -> tuple[DeviceMesh, MixedPrecisionPolicy] | None:
    """The mesh and mixed precision policy with which a stage shards its networks; None if the strategy does not shard."""
    if stage.device_mesh is None:
        return None
    return stage.device_mesh, mixed_precision(str(stage.trainer.precision))


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """The blocks of a U-Net or ControlNet that FSDP2 gathers one at a time; none for another module."""
    from diffusers import ControlNetModel, UNet2DConditionModel

    if not isinstance(module, UNet2DConditionModel | ControlNetModel):
        return []
    stages = [*module.down_blocks, module.mid_block, *getattr(module, "up_blocks", [])]
    return [stage for stage in stages if stage is not None]


def shard_unet(unet: nn.Module, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> None:
    """Shards a U-Net or ControlNet in place: one group per stage, and one for the rest. Idempotent.

    Two roles may share one U-Net, with and without its adapters.
    """
    if isinstance(unet, FSDPModule):
        return
    for block in blocks_of(unet):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    # By default the outermost group stays gathered after a forward pass. The gathered copies of a network whose parameters
    # required no gradients in that pass (the fake score, under the student's update) would require none in its own either.
    fully_shard(unet, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def shard_head(head: nn.Module, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> None:
    """Shards a discriminator's head in place as one group."""
    fully_shard(head, mesh=mesh, mp_policy=policy)


def unsharded_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that FSDP2 does not shard; not told by their type, since those that are gathered now are plain tensors."""
    sharded = {
        id(parameter)
        for inner in module.modules()
        if isinstance(inner, FSDPModule)
        for parameter in inner.parameters()
    }
    return [parameter for parameter in module.parameters() if id(parameter) not in sharded]
