"""The source of every tensor of a student: an explicit map from its name to the teacher's name or names.

The rules are BK-SDM's (arXiv:2305.15798): a block that the student has under the same name is copied; on the way up the
student's second layer is the teacher's last; where the innermost stages are gone, the student's up blocks are the teacher's
outer ones. Three cases that BK-SDM does not have are decided here:

- A Transformer of smaller depth gets evenly spaced blocks, the first among them (or means, see `BlockRule`).
- The first ResNet on the way up reads the hidden channels of the stage inside and then the skip channels. If that stage was
  removed and had another width, the skip columns are copied and the hidden ones are new: nothing in the teacher reads them.
- With `only_cross_attention` the first attention of a block reads the prompt. The teacher's first reads the image and does
  not fit, so that the student's is a copy of the teacher's second, with the norm before it.

Q, K and V are copied row by row, so a teacher's head keeps its rows. A student with another number of heads splits the rows
elsewhere, and its attention equals the teacher's only after distillation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sdxs_lightning.surgery.anatomy import Anatomy, anatomy_of
from sdxs_lightning.surgery.config import prune_config, shapes_of
from sdxs_lightning.surgery.selection import Layer, Selection, keep_all, select
from sdxs_lightning.surgery.topology import Topology

_ENDS = (
    "conv_in",
    "time_embedding",
    "class_embedding",
    "add_embedding",
    "encoder_hid_proj",
    "conv_norm_out",
    "conv_out",
)
"""Blocks outside the stages; a U-Net need not have all of them."""

_AS_SECOND = {"attn1": "attn2", "norm1": "norm2"}
"""Parts of a Transformer block that an only-cross-attention student copies from others."""


@dataclass(frozen=True)
class TensorSource:
    """The source of one tensor."""

    keys: tuple[str, ...] = ()
    """Teacher tensors: none, the tensor is new; one, it is copied; several, it is their mean."""
    last_columns: int | None = None
    """How many of the last input channels are copied; the others are new. None copies all."""


def key_map(
    teacher_config: Mapping[str, Any], topology: Topology, names: Iterable[str] | None = None
) -> dict[str, TensorSource]:
    """The source of every tensor of the pruned student, by its name in `state_dict()`.

    Args:
        teacher_config: arguments of the teacher's `UNet2DConditionModel`.
        topology: what the student keeps.
        names: the student's tensors where they are known already; None finds them on the meta device.

    Raises:
        ValueError: if the teacher does not contain such a student, or a tensor of either belongs to no known block.
    """
    teacher = anatomy_of(teacher_config)
    selection = select(teacher, topology)
    blocks = block_map(teacher, selection)
    sources: dict[str, TensorSource] = {}
    for key in shapes_of(prune_config(teacher_config, topology)) if names is None else names:
        block = block_of(key, blocks)
        if block is None:
            raise ValueError(f"the student's tensor '{key}' has no source: surgery does not know its block.")
        suffix = _renamed(key.removeprefix(block), block, teacher, selection)
        sources[key] = TensorSource(
            tuple(prefix + suffix for prefix in blocks[block]), _last_columns(key, teacher, selection)
        )
    return sources


def block_map(teacher: Anatomy, selection: Selection) -> dict[str, tuple[str, ...]]:
    """The teacher's block or blocks that each block of the student is made of."""
    count, teacher_count = len(selection.stages), len(teacher.stages)
    blocks: dict[str, tuple[str, ...]] = {name: (name,) for name in _ENDS}
    for r, stage in enumerate(selection.stages):
        blocks |= _side(f"down_blocks.{r}", f"down_blocks.{r}", stage.down)
        if r < count - 1:
            blocks[f"down_blocks.{r}.downsamplers"] = (f"down_blocks.{r}.downsamplers",)
        up, teacher_up = f"up_blocks.{count - 1 - r}", f"up_blocks.{teacher_count - 1 - r}"
        blocks |= _side(up, teacher_up, stage.up)
        if r > 0:
            blocks[f"{up}.upsamplers"] = (f"{teacher_up}.upsamplers",)
    if selection.mid != "none":
        blocks["mid_block.resnets.0"] = ("mid_block.resnets.0",)
    if selection.mid == "full":
        blocks["mid_block.resnets.1"] = ("mid_block.resnets.1",)
        blocks |= _transformer("mid_block.attentions.0", "mid_block.attentions.0", selection.mid_blocks)
    return blocks


def teacher_blocks(teacher: Anatomy) -> tuple[str, ...]:
    """All blocks that the teacher is made of."""
    return tuple(block_map(teacher, keep_all(teacher)))


def block_of(key: str, blocks: Mapping[str, Any] | tuple[str, ...]) -> str | None:
    """The block that a tensor belongs to; no block is part of another one."""
    parts = key.split(".")
    prefixes = (".".join(parts[:length]) for length in range(1, len(parts)))
    return next((prefix for prefix in prefixes if prefix in blocks), None)


def superseded(teacher_config: Mapping[str, Any], topology: Topology) -> tuple[str, ...]:
    """Parts of kept Transformer blocks that are replaced by other parts, as prefixes of the teacher's names."""
    teacher = anatomy_of(teacher_config)
    selection = select(teacher, topology)
    return tuple(
        f"{source}.{part}"
        for block, sources in block_map(teacher, selection).items()
        if _crosses_newly(block, teacher, selection)
        for source in sources
        for part in _AS_SECOND
    )


def _side(name: str, teacher_name: str, layers: tuple[Layer, ...]) -> dict[str, tuple[str, ...]]:
    blocks: dict[str, tuple[str, ...]] = {}
    for k, layer in enumerate(layers):
        blocks[f"{name}.resnets.{k}"] = (f"{teacher_name}.resnets.{layer.source}",)
        if layer.blocks:
            source = f"{teacher_name}.attentions.{layer.source}"
            blocks |= _transformer(f"{name}.attentions.{k}", source, layer.blocks)
    return blocks


def _transformer(
    name: str, teacher_name: str, chosen: tuple[tuple[int, ...], ...]
) -> dict[str, tuple[str, ...]]:
    blocks: dict[str, tuple[str, ...]] = {
        f"{name}.{part}": (f"{teacher_name}.{part}",) for part in ("norm", "proj_in", "proj_out")
    }
    for k, numbers in enumerate(chosen):
        blocks[f"{name}.transformer_blocks.{k}"] = tuple(
            f"{teacher_name}.transformer_blocks.{number}" for number in numbers
        )
    return blocks


def _crosses_newly(block: str, teacher: Anatomy, selection: Selection) -> bool:
    """Whether a block is a Transformer block of a stage that becomes cross-attention only in the student."""
    side, number = block.split(".")[:2] if ".transformer_blocks." in block else ("", "0")
    if side not in ("down_blocks", "up_blocks"):
        return False
    r = int(number) if side == "down_blocks" else len(selection.stages) - 1 - int(number)
    return selection.stages[r].only_cross_attention and not teacher.stages[r].only_cross_attention


def _renamed(suffix: str, block: str, teacher: Anatomy, selection: Selection) -> str:
    part = suffix.split(".")[1]
    if part in _AS_SECOND and _crosses_newly(block, teacher, selection):
        return suffix.replace(part, _AS_SECOND[part], 1)
    return suffix


def _last_columns(key: str, teacher: Anatomy, selection: Selection) -> int | None:
    inner = len(selection.stages) - 1
    removed_next = teacher.stages[min(inner + 1, len(teacher.stages) - 1)].width
    width = teacher.stages[inner].width
    reads_input = (
        "up_blocks.0.resnets.0.norm1.",
        "up_blocks.0.resnets.0.conv1.weight",
        "up_blocks.0.resnets.0.conv_shortcut.weight",
    )
    # Of its input the hidden channels come first; the skip that follows them is a layer of the same stage.
    return width if removed_next != width and key.startswith(reads_input) else None
