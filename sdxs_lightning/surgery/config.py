"""The config of the student's U-Net from that of the teacher's, and networks without memory for their weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from sdxs_lightning.surgery.anatomy import ATTENDS, MID_BLOCKS, Anatomy, anatomy_of, full_config, per_stage
from sdxs_lightning.surgery.selection import Layer, Selection, depth_settings, select
from sdxs_lightning.surgery.topology import Topology

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


_DOWN = {attends: name for name, attends in ATTENDS.items() if "Down" in name}
_UP = {attends: name for name, attends in ATTENDS.items() if "Up" in name}
_MID = {mid: name for name, mid in MID_BLOCKS.items()}


def prune_config(teacher_config: Mapping[str, Any], topology: Topology) -> dict[str, Any]:
    """The student's config.

    What the topology does not mention (widths, heads, prompt width, projections, added conditioning) is the teacher's.

    Args:
        teacher_config: arguments of `UNet2DConditionModel`, or the `config` of one.
        topology: what to keep.

    Returns:
        All arguments of `UNet2DConditionModel`.

    Raises:
        ValueError: if the teacher does not contain such a student, or has blocks that surgery does not know.
    """
    config = full_config(teacher_config)
    teacher = anatomy_of(config)
    selection = select(teacher, topology)
    count, teacher_count = len(selection.stages), len(teacher.stages)
    heads = per_stage(config["attention_head_dim"], teacher_count)
    changed = {
        "block_out_channels": [stage.width for stage in teacher.stages[:count]],
        "down_block_types": [_DOWN[_attends(stage.down)] for stage in selection.stages],
        "up_block_types": [_UP[_attends(stage.up)] for stage in reversed(selection.stages)],
        "mid_block_type": _MID[selection.mid],
        "layers_per_block": [len(stage.down) for stage in selection.stages],
        "attention_head_dim": [stage.heads or heads[r] for r, stage in enumerate(selection.stages)],
        "only_cross_attention": [stage.only_cross_attention for stage in selection.stages],
        "cross_attention_dim": per_stage(config["cross_attention_dim"], teacher_count)[:count],
        **_depths(selection, teacher),
    }
    return config | {name: _like(config[name], value) for name, value in changed.items()}


def _attends(layers: tuple[Layer, ...]) -> bool:
    return bool(layers[0].blocks)


def _depths(selection: Selection, teacher: Anatomy) -> dict[str, Any]:
    """The Transformer depths; those on the way up only if they do not mirror those on the way down."""
    pairs = list(zip(selection.stages, teacher.stages, strict=False))
    down = [_short(depth_settings(stage.down, anatomy.down)) for stage, anatomy in pairs]
    up = [_short(depth_settings(stage.up, anatomy.up)) for stage, anatomy in pairs]
    mirrored = all(isinstance(value, int) for value in down) and all(
        value == below or not _attends(stage.up)
        for value, below, stage in zip(up, down, selection.stages, strict=True)
    )
    return {
        "transformer_layers_per_block": down,
        "reverse_transformer_layers_per_block": None if mirrored else list(reversed(up)),
    }


def _short(depths: tuple[int, ...]) -> int | list[int]:
    return depths[0] if len(set(depths)) == 1 else list(depths)


def _like(teacher: Any, values: Any) -> Any:
    """One number where the teacher has one and all stages agree; otherwise the list, as JSON has it."""
    scalar = isinstance(values, list) and not isinstance(teacher, list | tuple | None)
    return values[0] if scalar and all(value == values[0] for value in values) else values


def meta_unet(config: Mapping[str, Any]) -> UNet2DConditionModel:
    """A U-Net on the meta device."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(**full_config(config))


def shapes_of(config: Mapping[str, Any]) -> dict[str, torch.Size]:
    """The shape of every tensor in the `state_dict()` of a U-Net."""
    return {name: tensor.shape for name, tensor in meta_unet(config).state_dict().items()}
