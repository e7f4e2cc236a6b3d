"""Low-rank adapters on a U-Net with frozen weights.

A layer W becomes W + alpha / rank * B A, with A (rank, in) and B (out, rank); for a convolution A has the kernel and B is
1x1. The layers are peft's, added through diffusers' adapter interface, so the U-Net's class stays the stock one.

Source: LoRA, arXiv:2106.09685, section 4.1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sdxs_lightning.core.option_bounds import LARGEST_RANK
from sdxs_lightning.networks.lora_extraction import low_rank
from sdxs_lightning.networks.lora_files import Adapters, read_lora

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


ADAPTER = "default"
"""peft's name of the adapter; a network has only one."""

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
"""The layers of LCM-LoRA. The released anime adapter of SDXS has exactly these, with rank 64 and 27.07 M weights."""


@dataclass(frozen=True)
class LoRA:
    """Settings of the adapters.

    Raises:
        ValueError: for a rank outside [1, LARGEST_RANK], an alpha that is not above 0, or no targets.
    """

    rank: int = 64
    """Rank of the adapters; 4 to 8 is "extremely low" (SDXS's GAN fine-tune), a fake score needs 64 to follow a student."""
    alpha: float | None = None
    """The adapter is scaled by alpha / rank; None is the rank, a scale of 1."""
    targets: tuple[str, ...] = TARGETS
    """Name suffixes of the linear layers and convolutions that get adapters. By default the usual ones that the network has: a
    ControlNet, for example, has no upsampler."""
    seed: int = 0
    """Seed of the matrices A. The matrices B start at zero, so the network starts unchanged."""
    weights: str | None = None
    """LoRA that the adapters start from, made for this U-Net: a .safetensors file of diffusers, PEFT or kohya, or a folder with
    one. One of a higher rank is reduced. null starts without a change."""

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= LARGEST_RANK:
            raise ValueError(f"lora.rank must be in [1, {LARGEST_RANK}], got {self.rank}.")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise ValueError(f"lora.alpha must be above 0, or null for the rank, got {self.alpha}.")
        if not self.targets:
            raise ValueError(
                "lora.targets names no layer; leave it out for the usual ones, or set lora to null."
            )


def add_lora(unet: UNet2DConditionModel, lora: LoRA) -> UNet2DConditionModel:
    """Freezes a U-Net and adds trainable adapters; without `lora.weights` its output stays bit-identical.

    Args:
        unet: modified in place; keeps its class and config.
        lora: the settings.

    Raises:
        FileNotFoundError: if there are no `lora.weights`.
        ValueError: if a target matches no linear layer or convolution of this U-Net, or `lora.weights` is of another network
            or adapts a layer that is no target.
    """
    from peft import LoraConfig

    targets = tuple(lora.targets)
    if targets == TARGETS:
        targets = tuple(target for target in targets if _layers(unet, target))
    for target in targets:
        _check_target(unet, target)
    # On the meta device, in the memory plan, weights change nothing.
    start = None if next(unet.parameters()).is_meta else lora.weights
    adapters = {} if start is None else read_lora(start, unet, "lora.weights").adapters
    unet.requires_grad_(False)
    config = LoraConfig(
        r=lora.rank,
        # peft declares an int but only divides, so a float works.
        lora_alpha=lora.rank if lora.alpha is None else lora.alpha,  # type: ignore[arg-type]
        target_modules=list(targets),
    )
    # A random state of its own, so that adapters do not depend on earlier draws, which differ between ranks.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(lora.seed)
        unet.add_adapter(config, ADAPTER)
    _start_from(unet, adapters, lora)
    return unet


def _start_from(unet: UNet2DConditionModel, adapters: Adapters, lora: LoRA) -> None:
    """Copies a LoRA into new adapters; rows of A beyond its rank keep their random start, beside columns of zeros in B."""
    scale = (lora.rank if lora.alpha is None else lora.alpha) / lora.rank
    others = [name for name in adapters if not hasattr(unet.get_submodule(name), "lora_A")]
    if others:
        raise ValueError(
            f"lora.weights '{lora.weights}' adapts {len(others)} layer(s) that are not among lora.targets, such as "
            f"'{others[0]}': name them there, or give another LoRA."
        )
    for name, adapter in adapters.items():
        reduced = low_rank(adapter.delta(), lora.rank)[0] if adapter.rank > lora.rank else adapter
        layer: Any = unet.get_submodule(name)
        down, up = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        with torch.no_grad():
            down[: reduced.rank] = reduced.down.view(-1, *down.shape[1:])
            up[:, : reduced.rank] = reduced.up.view(len(up), -1, *up.shape[2:]) * (
                reduced.alpha / reduced.rank / scale
            )


def lora_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' weights by name; empty without adapters."""
    return {name: parameter for name, parameter in module.named_parameters() if _is_adapter(name)}


def cast_base(unet: UNet2DConditionModel, dtype: torch.dtype) -> None:
    """Casts the frozen weights in place; the adapters stay float32."""
    for name, parameter in unet.named_parameters():
        if not _is_adapter(name):
            parameter.data = parameter.data.to(dtype)


def merged_weights(unet: UNet2DConditionModel, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Merges the adapters: W + alpha / rank * B A under the names of the network without adapters.

    Args:
        unet: the network; without adapters, they are `weights`.
        weights: `unet.state_dict()`, unsharded; not modified.

    Returns:
        Tensors by name, in the dtype of W; the sum is computed in float64, so that merging rounds once.
    """
    return dict(each_merged(unet, weights))


def each_merged(unet: UNet2DConditionModel, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The items of `merged_weights`, computed one at a time; `weights` may be `named_parameters()`, sharded or not."""
    config = getattr(unet, "peft_config", {}).get(ADAPTER)
    if config is None:
        yield from weights.items()
        return
    scale = config.lora_alpha / config.r
    for name, value in weights.items():
        if _is_adapter(name):
            continue
        plain, layer = plain_name(name), name.removesuffix(".base_layer.weight")
        if layer == name:
            yield plain, value
            continue
        down, up = (weights[f"{layer}.lora_{part}.{ADAPTER}.weight"].double().flatten(1) for part in "AB")
        yield plain, (value.double() + scale * (up @ down).view(value.shape)).to(value.dtype)


def plain_shapes(unet: UNet2DConditionModel) -> dict[str, torch.Size]:
    """Shapes of the weights by their names in the network without adapters."""
    return {
        plain_name(name): weight.shape for name, weight in unet.named_parameters() if not _is_adapter(name)
    }


def plain_name(name: str) -> str:
    """Name of a weight in the network without adapters."""
    return name.replace(".base_layer.", ".")


def _is_adapter(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def _check_target(unet: UNet2DConditionModel, target: str) -> None:
    layers = _layers(unet, target)
    if not layers or not all(isinstance(layer, nn.Linear | nn.Conv2d) for layer in layers):
        found = f"is a {type(layers[0]).__name__}" if layers else "is no layer of this U-Net"
        raise ValueError(
            f"lora.targets: '{target}' {found}; give ends of names of linear layers or convolutions, such as "
            f"{', '.join(TARGETS[:4])}, or leave lora.targets out."
        )


def _layers(unet: UNet2DConditionModel, target: str) -> list[nn.Module]:
    """The modules whose names end so."""
    return [module for name, module in unet.named_modules() if f".{name}".endswith(f".{target}")]
