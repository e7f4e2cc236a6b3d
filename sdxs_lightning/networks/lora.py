"""Low-rank adapters: a U-Net learns through a few new weights while its own stay fixed.

A layer W becomes W + alpha / rank * B A, with A (rank, in) and B (out, rank); for a convolution A has the kernel and B is
1x1. The layers are peft's, added through diffusers' adapter interface, so that the U-Net stays a stock one.

Source: LoRA, arXiv:2106.09685, section 4.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor, nn

ADAPTER = "default"
"""peft's name of the only adapter that a network has here."""

TARGETS = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv2",
    "conv_shortcut",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
    "time_emb_proj",
)
"""The layers of LCM-LoRA: with rank 64 the released anime adapter of SDXS has exactly these, 27.07 M weights."""


@dataclass(frozen=True)
class LoRA:
    """Which layers get adapters, and how large.

    Raises:
        ValueError: for a rank below 1, an alpha that is not above 0, or no targets.
    """

    rank: int = 64
    """Columns of B; 4 to 8 is "extremely low" (SDXS's GAN fine-tune), 64 is what a fake score needs to follow a student."""
    alpha: float | None = None
    """The adapter counts alpha / rank times; None is the rank itself, so that it counts once."""
    targets: tuple[str, ...] = TARGETS
    """Ends of the names of linear layers and convolutions."""
    seed: int = 0
    """Of the matrices A. The matrices B start at zero, so the network starts unchanged."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora.rank must be 1 or more, got {self.rank}.")
        if self.alpha is not None and self.alpha <= 0:
            raise ValueError(f"lora.alpha must be above 0, or null for the rank, got {self.alpha}.")
        if not self.targets:
            raise ValueError(
                "lora.targets names no layer; leave it out for the usual ones, or set lora to null."
            )


def add_lora(unet: UNet2DConditionModel, lora: LoRA) -> UNet2DConditionModel:
    """Freezes a U-Net and gives it adapters that learn; its output stays the same to the last bit.

    Args:
        unet: changed in place; its type and config stay.
        lora: the settings.

    Raises:
        ValueError: for a target that is the name of no linear layer or convolution of this U-Net.
    """
    for target in lora.targets:
        _check_target(unet, target)
    unet.requires_grad_(False)
    config = LoraConfig(
        r=lora.rank,
        # peft declares an int and divides; a float passes through.
        lora_alpha=lora.rank if lora.alpha is None else lora.alpha,  # type: ignore[arg-type]
        target_modules=list(lora.targets),
    )
    # Its own random state: adapters that depended on what was drawn before would differ between ranks.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(lora.seed)
        unet.add_adapter(config, ADAPTER)
    return unet


def lora_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' weights by name; empty for a network without adapters."""
    return {name: parameter for name, parameter in module.named_parameters() if _is_adapter(name)}


def cast_base(unet: UNet2DConditionModel, dtype: torch.dtype) -> None:
    """Casts the frozen weights in place; the adapters stay float32."""
    for name, parameter in unet.named_parameters():
        if not _is_adapter(name):
            parameter.data = parameter.data.to(dtype)


def merged_weights(unet: UNet2DConditionModel, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The weights of the same network without adapters: W + alpha / rank * B A under the plain names.

    Args:
        unet: whose adapters they are; one without adapters gets its weights back.
        weights: of `unet.state_dict()`, unsharded; not changed.

    Returns:
        Name -> tensor, in the type of W; the product is added in float64, so that merging rounds once.
    """
    config = getattr(unet, "peft_config", {}).get(ADAPTER)
    if config is None:
        return weights
    scale = config.lora_alpha / config.r
    merged: dict[str, Tensor] = {}
    for name, value in weights.items():
        if _is_adapter(name):
            continue
        plain = name.replace(".base_layer.", ".")
        layer = name.removesuffix(".base_layer.weight")
        if layer == name:
            merged[plain] = value
            continue
        down, up = (weights[f"{layer}.lora_{part}.{ADAPTER}.weight"].double().flatten(1) for part in "AB")
        merged[plain] = (value.double() + scale * (up @ down).view(value.shape)).to(value.dtype)
    return merged


def _is_adapter(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def _check_target(unet: UNet2DConditionModel, target: str) -> None:
    layers = [module for name, module in unet.named_modules() if f".{name}".endswith(f".{target}")]
    if not layers or not all(isinstance(layer, nn.Linear | nn.Conv2d) for layer in layers):
        found = f"is a {type(layers[0]).__name__}" if layers else "is no layer of this U-Net"
        raise ValueError(
            f"lora.targets: '{target}' {found}; give ends of names of linear layers or convolutions, such as "
            f"{', '.join(TARGETS[:4])}, or leave lora.targets out."
        )
