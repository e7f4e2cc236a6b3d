"""FSDP2, network by network."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard


def mixed_precision(precision: str) -> MixedPrecisionPolicy:
    """How FSDP2 gathers float32 masters for a Trainer's `precision`.

    With "bf16-mixed" the gathered copies are bfloat16, half the bytes of casting after gathering; gradients are
    reduced in float32.
    """
    if precision == "bf16-mixed":
        # Inputs are left to autocast: FSDP2 would round SDXL's add_time_ids, and bfloat16 cannot tell 1023 px from 1024 px.
        return MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    return MixedPrecisionPolicy()


def shard_unet(unet: UNet2DConditionModel, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> None:
    """Shards a U-Net in place, one group a stage, the rest in the U-Net's own group."""
    for block in [*unet.down_blocks, unet.mid_block, *unet.up_blocks]:
        if block is not None:
            fully_shard(block, mesh=mesh, mp_policy=policy)
    # By default the outermost group stays gathered after a forward pass. The gathered copies of a network that rested in
    # that pass (the fake score, judging without graph) would then still not require gradients when it is to learn.
    fully_shard(unet, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def shard_head(head: nn.Module, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> None:
    """Shards a discriminator's head in place, as one group."""
    fully_shard(head, mesh=mesh, mp_policy=policy)
