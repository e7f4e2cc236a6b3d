"""What a pruned student keeps of its teacher's U-Net, as it is written in YAML.

A U-Net is described by resolution: stage 0 is the outermost one and holds `down_blocks.0` together with the last up block.
A *layer* is a ResNet with the Transformer after it; a down stage of SD has two, an up stage one more. The *depth* of a
layer is the number of blocks in its Transformer; 0 means a stage of ResNets only.

    topology:
      stages:                      # of four, the innermost is removed
        - {down_layers: [0], up_layers: [0, -1], down_depths: 0, up_depths: 0}
        - {down_layers: [0], up_layers: [0, -1]}
        - {down_layers: [0], up_layers: [0, -1]}
      mid_block: none
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

MidBlock = Literal["full", "resnet", "none"]
"""ResNet, Transformer, ResNet; the first ResNet alone; nothing."""

BlockRule = Literal["spaced", "first", "mean"]
"""Which of D Transformer blocks become d: evenly spaced ones, the first among them; the first d; means of D/d neighbours."""


@dataclass(frozen=True)
class Stage:
    """One resolution of the student; what is not given stays as in the teacher."""

    down_layers: tuple[int, ...] | None = None
    """Teacher layers kept on the way down, in order; the first has to be 0, which changes the width."""
    up_layers: tuple[int, ...] | None = None
    """Teacher layers kept on the way up, one more than on the way down; -1 is the last, which has to be among them."""
    down_depths: int | tuple[int, ...] | None = None
    """Transformer blocks of the kept down layers: one number for all, or one each; 0 removes the Transformers."""
    up_depths: int | tuple[int, ...] | None = None
    """The same on the way up."""
    attention_heads: int | None = None
    """Number of heads (diffusers names it attention_head_dim). Q, K, V are copied in the teacher's order of rows."""
    only_cross_attention: bool | None = None
    """True: the first attention of each block reads the prompt too; it starts as a copy of the second."""

    def __post_init__(self) -> None:
        """Refuses what no U-Net can have.

        Raises:
            ValueError: for an empty list of layers, a negative depth, or no heads.
        """
        for name, layers in (("down_layers", self.down_layers), ("up_layers", self.up_layers)):
            if layers is not None and not layers:
                raise ValueError(f"{name} must keep at least one layer, got none; leave it away to keep all.")
        for name, depths in (("down_depths", self.down_depths), ("up_depths", self.up_depths)):
            given = () if depths is None else (depths,) if isinstance(depths, int) else depths
            if any(depth < 0 for depth in given):
                raise ValueError(f"{name} must be 0 or more, got {_shown(given)}.")
            if any(given) and not all(given):
                raise ValueError(
                    f"{name} must be 0 for all layers of a stage or for none, got {_shown(given)}; diffusers has no stage "
                    "with a Transformer after some of its ResNets."
                )
        if self.attention_heads is not None and self.attention_heads < 1:
            raise ValueError(f"attention_heads must be 1 or more, got {self.attention_heads}.")


@dataclass(frozen=True)
class Topology:
    """Which stages, layers and Transformer blocks of a teacher a student keeps; the default keeps everything."""

    stages: tuple[Stage, ...] | None = None
    """The kept stages, outermost first; those further inside are removed. None keeps all as they are."""
    mid_block: MidBlock | None = None
    """What is kept of the middle; None keeps it as it is."""
    transformer_blocks: BlockRule = "spaced"
    """Which blocks a Transformer of smaller depth gets."""
    added_conditioning: Literal["any", "none", "text_time"] = "any"
    """The added conditioning (`addition_embed_type`) of the U-Nets that this is meant for; others are refused."""
    name: str = "custom"
    """For messages and reports."""
    note: str = ""
    """Where it is from."""

    def __post_init__(self) -> None:
        """Refuses a student without stages.

        Raises:
            ValueError: for an empty list of stages.
        """
        if self.stages is not None and not self.stages:
            raise ValueError("stages must keep at least one stage, got none; leave it away to keep all.")


def _shown(depths: Sequence[int]) -> str:
    return str(depths[0]) if len(depths) == 1 else str(list(depths))
