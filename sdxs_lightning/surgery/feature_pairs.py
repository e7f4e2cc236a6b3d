"""Corresponding blocks of student and teacher: the default taps of feature distillation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdxs_lightning.surgery.anatomy import Side, anatomy_of
from sdxs_lightning.surgery.selection import Layer, select
from sdxs_lightning.surgery.topology import Topology


def feature_pairs(teacher_config: Mapping[str, Any], topology: Topology) -> dict[str, str]:
    """One tap for each kept stage, down, middle and up; the outputs of a pair have the same shape.

    Where inner stages were removed, the teacher's block at the student's innermost stage ends with a downsampler that the
    student's does not have. The tap is then the last layer before it, as in BK-SDM the `proj_out` of the last Transformer.

    Args:
        teacher_config: arguments of the teacher's `UNet2DConditionModel`.
        topology: what the student keeps.

    Returns:
        Module name in the student -> module name in the teacher.

    Raises:
        ValueError: if the teacher does not contain such a student.
    """
    teacher = anatomy_of(teacher_config)
    selection = select(teacher, topology)
    count, teacher_count = len(selection.stages), len(teacher.stages)
    pairs = {f"down_blocks.{r}": f"down_blocks.{r}" for r in range(count)}
    if count < teacher_count:
        inner = count - 1
        del pairs[f"down_blocks.{inner}"]
        student_tap, teacher_tap = _last_layers(selection.stages[inner].down, teacher.stages[inner].down)
        pairs[f"down_blocks.{inner}.{student_tap}"] = f"down_blocks.{inner}.{teacher_tap}"
    if selection.mid != "none":
        pairs["mid_block"] = "mid_block"
    return pairs | {f"up_blocks.{i}": f"up_blocks.{i + teacher_count - count}" for i in range(count)}


def _last_layers(student: tuple[Layer, ...], teacher: Side) -> tuple[str, str]:
    last, teacher_last = len(student) - 1, len(teacher.settings) - 1
    if student[-1].blocks:
        return f"attentions.{last}.proj_out", f"attentions.{teacher_last}.proj_out"
    return f"resnets.{last}", f"{'attentions' if teacher.attends else 'resnets'}.{teacher_last}"
