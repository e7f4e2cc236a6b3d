"""FSDP2 per network: the strategy, and the sharding functions that stages call in `configure_model`."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.optim import Optimizer


class ShardedNetworks(ModelParallelStrategy):
    """Lightning's FSDP2 strategy with all processes on the data-parallel axis.

    Lightning's "auto" puts nodes on the data-parallel axis and the GPUs of a node on the tensor-parallel axis, which these
    networks do not use.

    Args:
        save_distributed_checkpoint: every rank writes its shard into a folder; False gathers one file on rank 0.
        process_group_backend: None takes nccl on GPUs and gloo on CPUs.
    """

    def __init__(
        self, save_distributed_checkpoint: bool = True, process_group_backend: str | None = None
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
        )

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
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


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
