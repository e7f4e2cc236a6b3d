"""Pruning: a smaller U-Net from a larger one, with a report on its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sdxs_lightning.surgery.anatomy import anatomy_of
from sdxs_lightning.surgery.config import prune_config, shapes_of
from sdxs_lightning.surgery.key_map import TensorSource, block_map, key_map, superseded, teacher_blocks
from sdxs_lightning.surgery.report import Shapes, TransferReport, account, input_axis
from sdxs_lightning.surgery.selection import select
from sdxs_lightning.surgery.topology import Topology

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


def prune(
    teacher: UNet2DConditionModel, topology: Topology, transfer: bool = True, seed: int = 0
) -> tuple[UNet2DConditionModel, TransferReport]:
    """Creates the student.

    Args:
        teacher: the U-Net to prune; it is not changed. A pruned one may be pruned further.
        topology: what to keep of it.
        transfer: copy weights; False gives the same network with fresh weights, the control of experiments.
        seed: of the fresh weights.

    Returns:
        The student in eval mode, with the teacher's dtype and device, and the report on its weights.

    Raises:
        ValueError: if the teacher does not contain such a student, or a tensor is left unaccounted for.
    """
    from diffusers import UNet2DConditionModel

    config = prune_config(teacher.config, topology)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = UNet2DConditionModel(**config)
    # nn.Module's own to(): diffusers' warns of modules to keep in float32, of which this class has none.
    nn.Module.to(student, device=teacher.device, dtype=teacher.dtype)
    ours, theirs = student.state_dict(), teacher.state_dict()
    sources, report = _sources(teacher.config, topology, transfer, _shapes(ours), _shapes(theirs))
    copy_weights(ours, theirs, sources)
    return student.eval(), report


def transfer_report(
    teacher_config: Mapping[str, Any], topology: Topology, transfer: bool = True
) -> TransferReport:
    """The report that `prune` would return, from the config alone.

    Raises:
        ValueError: as `prune`.
    """
    student = shapes_of(prune_config(teacher_config, topology))
    return _sources(teacher_config, topology, transfer, student, shapes_of(teacher_config))[1]


@torch.no_grad()
def copy_weights(
    student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], sources: Mapping[str, TensorSource]
) -> None:
    """Copies the teacher's weights into the student's tensors; those without a source are left unchanged."""
    for key, source in sources.items():
        target = student[key]
        if len(source.keys) > 1:
            # torch accumulates float16 in float32.
            target.copy_(torch.stack([teacher[name] for name in source.keys]).mean(0))
        elif source.keys and source.last_columns is None:
            target.copy_(teacher[source.keys[0]])
        elif source.keys:
            axis, count = input_axis(target.shape), source.last_columns
            assert count is not None
            origin = teacher[source.keys[0]]
            target.narrow(axis, target.shape[axis] - count, count).copy_(
                origin.narrow(axis, origin.shape[axis] - count, count)
            )


def _sources(
    teacher_config: Mapping[str, Any], topology: Topology, transfer: bool, student: Shapes, teacher: Shapes
) -> tuple[dict[str, TensorSource], TransferReport]:
    anatomy = anatomy_of(teacher_config)
    removable = teacher_blocks(anatomy)
    if not transfer:
        sources = {key: TensorSource() for key in student}
        return sources, account(topology.name, sources, student, teacher, removable)
    sources = key_map(teacher_config, topology, student)
    kept = {name for names in block_map(anatomy, select(anatomy, topology)).values() for name in names}
    removable = tuple(name for name in removable if name not in kept) + superseded(teacher_config, topology)
    return sources, account(topology.name, sources, student, teacher, removable)


def _shapes(weights: Mapping[str, Tensor]) -> Shapes:
    return {name: tensor.shape for name, tensor in weights.items()}
