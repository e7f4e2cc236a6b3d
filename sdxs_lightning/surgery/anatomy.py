"""The config of a U-Net as stages, layers and Transformer depths: the only file that knows diffusers' spellings."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sdxs_lightning.surgery.topology import MidBlock

ATTENDS = {"CrossAttnDownBlock2D": True, "CrossAttnUpBlock2D": True, "DownBlock2D": False, "UpBlock2D": False}
"""Supported block types, and whether their layers have a Transformer."""

MID_BLOCKS: dict[str | None, MidBlock] = {
    "UNetMidBlock2DCrossAttn": "full",
    "UNetMidBlock2D": "resnet",
    None: "none",
}


@dataclass(frozen=True)
class Side:
    """A stage on the way down or up."""

    attends: bool
    """Whether its layers have a Transformer."""
    settings: tuple[int, ...]
    """The config's depth for each layer, which counts only where `attends`."""

    @property
    def depths(self) -> tuple[int, ...]:
        """Transformer blocks of each layer; 0 without a Transformer."""
        return self.settings if self.attends else (0,) * len(self.settings)


@dataclass(frozen=True)
class StageAnatomy:
    """One resolution."""

    width: int
    down: Side
    up: Side
    only_cross_attention: bool


@dataclass(frozen=True)
class Anatomy:
    """A complete U-Net, stages outermost first."""

    stages: tuple[StageAnatomy, ...]
    mid: MidBlock
    mid_depth: int
    """Transformer blocks of the middle; 0 unless it is "full"."""
    added_conditioning: str
    """`addition_embed_type` of its config, "none" without one; "text_time" is conditioned on sizes and a pooled prompt."""


def full_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Every argument of `UNet2DConditionModel`: those given, and the class's defaults for the others.

    Fields with a leading underscore (diffusers' metadata) and fields that the class does not take are left out, as
    diffusers does when it loads.
    """
    from diffusers import UNet2DConditionModel

    parameters = inspect.signature(UNet2DConditionModel.__init__).parameters
    return {
        name: config.get(name, parameter.default) for name, parameter in parameters.items() if name != "self"
    }


def anatomy_of(config: Mapping[str, Any]) -> Anatomy:
    """Reads a U-Net's config.

    Args:
        config: arguments of `UNet2DConditionModel`, or the `config` of one.

    Raises:
        ValueError: for an unsupported block type.
    """
    config = full_config(config)
    widths = config["block_out_channels"]
    count = len(widths)
    layers = per_stage(config["layers_per_block"], count)
    depths = per_stage(config["transformer_layers_per_block"], count)
    reverse = config["reverse_transformer_layers_per_block"]
    up_depths = depths if reverse is None else list(reversed(reverse))
    crossing = per_stage(config["only_cross_attention"], count)
    up_types = list(reversed(config["up_block_types"]))
    stages = tuple(
        StageAnatomy(
            width=widths[r],
            down=Side(_attends(config["down_block_types"][r]), _per_layer(depths[r], layers[r])),
            up=Side(_attends(up_types[r]), _per_layer(up_depths[r], layers[r] + 1)),
            only_cross_attention=crossing[r],
        )
        for r in range(count)
    )
    if config["mid_block_type"] not in MID_BLOCKS:
        raise ValueError(
            f"surgery knows no mid block '{config['mid_block_type']}'; it knows "
            f"{', '.join(str(name) for name in MID_BLOCKS)}."
        )
    mid = MID_BLOCKS[config["mid_block_type"]]
    # diffusers builds the middle from the innermost down stage's setting, whatever that stage is.
    mid_depth = stages[-1].down.settings[0] if mid == "full" else 0
    return Anatomy(stages, mid, mid_depth, config["addition_embed_type"] or "none")


def per_stage(value: Any, count: int) -> list[Any]:
    """A setting that diffusers takes once or for each stage, for each stage."""
    return list(value) if isinstance(value, list | tuple) else [value] * count


def _per_layer(value: Any, count: int) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,) * count


def _attends(block_type: str) -> bool:
    if block_type not in ATTENDS:
        raise ValueError(f"surgery knows no block '{block_type}'; it knows {', '.join(ATTENDS)}.")
    return ATTENDS[block_type]
