"""A topology applied to a teacher: the numbers of the layers and Transformer blocks that the student takes over."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sdxs_lightning.surgery.anatomy import Anatomy, Side, StageAnatomy
from sdxs_lightning.surgery.topology import BlockRule, MidBlock, Stage, Topology

_MID_PARTS: dict[MidBlock, int] = {"none": 0, "resnet": 1, "full": 2}


@dataclass(frozen=True)
class Layer:
    """A layer of the student."""

    source: int
    """The teacher's layer in the same stage."""
    blocks: tuple[tuple[int, ...], ...]
    """The teacher's blocks of each of its Transformer blocks; several are averaged."""


@dataclass(frozen=True)
class StageSelection:
    """One resolution of the student."""

    down: tuple[Layer, ...]
    up: tuple[Layer, ...]
    heads: int | None
    """Attention heads; None keeps the teacher's."""
    only_cross_attention: bool


@dataclass(frozen=True)
class Selection:
    """A complete student, stages outermost first."""

    stages: tuple[StageSelection, ...]
    mid: MidBlock
    mid_blocks: tuple[tuple[int, ...], ...]


def select(teacher: Anatomy, topology: Topology) -> Selection:
    """Resolves a topology.

    Args:
        teacher: the anatomy of the U-Net to prune.
        topology: what to keep of it.

    Raises:
        ValueError: if the teacher does not contain such a student.
    """
    name = topology.name
    if topology.added_conditioning not in ("any", teacher.added_conditioning):
        raise ValueError(
            f"topology '{name}' is for a U-Net with added conditioning '{topology.added_conditioning}' "
            f"(addition_embed_type of its config), and this one has '{teacher.added_conditioning}'; choose another preset "
            "or another base."
        )
    stages = topology.stages or (Stage(),) * len(teacher.stages)
    if len(stages) > len(teacher.stages):
        raise ValueError(
            f"topology '{name}' keeps {len(stages)} stages, and this U-Net has {len(teacher.stages)}; choose a smaller one."
        )
    chosen = tuple(
        _stage(stage, anatomy, topology, r)
        for r, (stage, anatomy) in enumerate(zip(stages, teacher.stages, strict=False))
    )
    mid = topology.mid_block or teacher.mid
    return Selection(chosen, mid, _mid(teacher, topology, mid, chosen))


def choose_blocks(teacher_depth: int, depth: int, rule: BlockRule) -> tuple[tuple[int, ...], ...]:
    """Which of `teacher_depth` Transformer blocks each of `depth` blocks is made of.

    10 to 4: spaced ((0,), (2,), (5,), (7,)), first ((0,), (1,), (2,), (3,)), mean ((0, 1), (2, 3, 4), (5, 6), (7, 8, 9)).
    """
    starts = [k * teacher_depth // depth for k in range(depth)]
    if not starts:
        return ()
    if rule == "first":
        return tuple((k,) for k in range(depth))
    if rule == "spaced":
        return tuple((start,) for start in starts)
    return tuple(
        tuple(range(start, end)) for start, end in zip(starts, [*starts[1:], teacher_depth], strict=True)
    )


def _stage(stage: Stage, teacher: StageAnatomy, topology: Topology, number: int) -> StageSelection:
    where = f"topology '{topology.name}', stages[{number}]"
    rule = topology.transformer_blocks
    down = _layers(stage.down_layers, stage.down_depths, teacher.down, rule, f"{where}.down")
    up = _layers(stage.up_layers, stage.up_depths, teacher.up, rule, f"{where}.up")
    if len(up) != len(down) + 1:
        raise ValueError(
            f"{where}: a U-Net has one layer more on the way up than on the way down, and this keeps {len(down)} down and "
            f"{len(up)} up; change down_layers or up_layers."
        )
    if up[-1].source != len(teacher.up.settings) - 1:
        raise ValueError(
            f"{where}.up_layers must end with the last layer (-1), which alone reads the stage outside, got {up[-1].source}."
        )
    heads = stage.attention_heads
    if heads is not None and teacher.width % heads:
        raise ValueError(f"{where}.attention_heads must divide the width {teacher.width}, got {heads}.")
    crossing = stage.only_cross_attention
    if crossing is False and teacher.only_cross_attention:
        raise ValueError(
            f"{where}.only_cross_attention is false, and the teacher has no self-attention to copy in this stage; "
            "leave it out."
        )
    return StageSelection(down, up, heads, teacher.only_cross_attention if crossing is None else crossing)


def _layers(
    wanted: tuple[int, ...] | None,
    depths: int | tuple[int, ...] | None,
    teacher: Side,
    rule: BlockRule,
    where: str,
) -> tuple[Layer, ...]:
    count = len(teacher.settings)
    layers = tuple(range(count)) if wanted is None else wanted
    if any(not -count <= layer < count for layer in layers):
        raise ValueError(f"{where}_layers must be among the teacher's {count} layers, got {list(layers)}.")
    layers = tuple(layer % count for layer in layers)
    if layers[0] != 0 or list(layers) != sorted(set(layers)):
        raise ValueError(
            f"{where}_layers must begin with layer 0, which alone reads the stage before, and rise; got {list(layers)}."
        )
    sources = [teacher.depths[layer] for layer in layers]
    wanted_depths = _depths(depths, sources, where)
    for depth, source in zip(wanted_depths, sources, strict=True):
        if depth > source:
            raise ValueError(
                f"{where}_depths asks for a Transformer of {depth} block(s) where this U-Net has {source}; surgery removes "
                "and adds nothing: choose another preset or base."
            )
    return tuple(
        Layer(layer, choose_blocks(source, depth, rule))
        for layer, source, depth in zip(layers, sources, wanted_depths, strict=True)
    )


def _depths(depths: int | tuple[int, ...] | None, sources: list[int], where: str) -> list[int]:
    if depths is None:
        return sources
    if isinstance(depths, int):
        return [depths] * len(sources)
    if len(depths) != len(sources):
        raise ValueError(
            f"{where}_depths must be one number or one for each of the {len(sources)} kept layers, got {list(depths)}."
        )
    return list(depths)


def _mid(
    teacher: Anatomy, topology: Topology, mid: MidBlock, stages: tuple[StageSelection, ...]
) -> tuple[tuple[int, ...], ...]:
    name = topology.name
    if _MID_PARTS[mid] > _MID_PARTS[teacher.mid]:
        raise ValueError(
            f"topology '{name}' keeps the mid block '{mid}', and this U-Net's is '{teacher.mid}'; choose a smaller one."
        )
    inner, teacher_inner = teacher.stages[len(stages) - 1], teacher.stages[-1]
    if mid != "none" and inner.width != teacher_inner.width:
        raise ValueError(
            f"topology '{name}' keeps the mid block, which is {teacher_inner.width} channels wide, on a stage of "
            f"{inner.width}; set mid_block to none or keep the innermost stage."
        )
    if mid != "full":
        return ()
    depth = depth_settings(stages[-1].down, inner.down)[0]
    if depth > teacher.mid_depth:
        raise ValueError(
            f"topology '{name}' would have {depth} Transformer block(s) in the middle, as in its innermost down stage, where "
            f"this U-Net has {teacher.mid_depth}; change mid_block or the depths of the innermost stage."
        )
    return choose_blocks(teacher.mid_depth, depth, topology.transformer_blocks)


def depth_settings(layers: tuple[Layer, ...], teacher: Side) -> tuple[int, ...]:
    """The layers' depths for the config; in a stage without Transformers the teacher's, which are not used."""
    depths = tuple(len(layer.blocks) for layer in layers)
    return depths if all(depths) else tuple(teacher.settings[layer.source] for layer in layers)


def keep_all(teacher: Anatomy) -> Selection:
    """The selection that removes nothing."""
    return select(teacher, replace(Topology(), name="all"))
