"""ControlNets for any U-Net of the SD and SDXL kinds: made from the U-Net, loaded, saved in diffusers' layout.

A ControlNet is a copy of a U-Net's encoder that also reads a condition image. Its outputs, one *residual* per skip connection
of the U-Net and one for the middle, pass through convolutions that start at zero and are added to the U-Net's own.

Source: ControlNet, arXiv:2302.05543, section 3; the layout is that of diffusers' `ControlNetModel`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding, zero_module
from torch import Tensor, nn

from sdxs_lightning.core.hub_ids import is_hub_id
from sdxs_lightning.families import hub
from sdxs_lightning.families.folders import read_json
from sdxs_lightning.families.weights import load_network
from sdxs_lightning.networks.lora import merged_weights

MidBlock = Literal["as_unet", "added"]
"""The ControlNet's mid block: the U-Net's (none if it has none), or a new cross-attention one, as in the released sketch
ControlNet of sdxs-512-dreamshaper, whose U-Net has none."""

StemInit = Literal["zero", "he"]
"""Weights of a new ControlNet's stem, the convolutions that read the condition image. "zero": diffusers' own, whose last one is
zero, so that the condition reaches the encoder only once the residuals' convolutions have moved. "he": all by He et al.
(arXiv:1502.01852), so that the encoder sees it from the first update. The residuals start at zero with either."""

STEM_WIDTHS = (16, 32, 96, 256)
"""Widths of diffusers' stem, the convolutions that bring a condition image to the size of the latents: one factor of 2 between
two of them, so 8 in all."""

_MID_BLOCKS = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D")
_ENCODER = ("conv_in", "time_proj", "time_embedding", "class_embedding", "encoder_hid_proj")
_ADDED = ("add_time_proj", "add_embedding")


class StudentControlNet(ControlNetModel):
    """A ControlNet for U-Nets that diffusers' class refuses: without mid block, or with layers that differ by stage.

    The forward pass is inherited. The arguments are `ControlNetModel`'s; `mid_block_type` may be None, and `layers_per_block`,
    `transformer_layers_per_block` and `cross_attention_dim` may be lists, as in `UNet2DConditionModel`. Pipelines accept it
    as `controlnet`; to load one from a folder use `load_controlnet`, since `ControlNetModel.from_pretrained` says
    "unknown mid_block_type : None".
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        conditioning_channels: int = 3,
        flip_sin_to_cos: bool = True,
        freq_shift: int = 0,
        down_block_types: tuple[str, ...] = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type: str | None = None,
        only_cross_attention: bool | tuple[bool, ...] = False,
        block_out_channels: tuple[int, ...] = (320, 640, 1280),
        layers_per_block: int | tuple[int, ...] = 1,
        downsample_padding: int = 1,
        mid_block_scale_factor: float = 1,
        act_fn: str = "silu",
        norm_num_groups: int | None = 32,
        norm_eps: float = 1e-5,
        cross_attention_dim: int | tuple[int, ...] = 768,
        transformer_layers_per_block: int | tuple[int | tuple[int, ...], ...] = 1,
        encoder_hid_dim: int | None = None,
        encoder_hid_dim_type: str | None = None,
        attention_head_dim: int | tuple[int, ...] = 8,
        num_attention_heads: int | tuple[int, ...] | None = None,
        use_linear_projection: bool = False,
        class_embed_type: str | None = None,
        addition_embed_type: str | None = None,
        addition_time_embed_dim: int | None = None,
        num_class_embeds: int | None = None,
        upcast_attention: bool = False,
        resnet_time_scale_shift: str = "default",
        projection_class_embeddings_input_dim: int | None = None,
        controlnet_conditioning_channel_order: str = "rgb",
        conditioning_embedding_out_channels: tuple[int, ...] | None = STEM_WIDTHS,
        global_pool_conditions: bool = False,
        addition_embed_type_num_heads: int = 64,
    ) -> None:
        super(ControlNetModel, self).__init__()
        given = {name: self.config[name] for name in _encoder_settings()}
        for name, part in _encoder_parts(given).items():
            setattr(self, name, part)
        self.controlnet_cond_embedding = ControlNetConditioningEmbedding(
            block_out_channels[0], conditioning_channels, tuple(conditioning_embedding_out_channels or ())
        )
        widths = skip_widths(self)
        self.controlnet_down_blocks = nn.ModuleList(zero_module(nn.Conv2d(w, w, 1)) for w in widths)
        last = block_out_channels[-1]
        self.controlnet_mid_block = zero_module(nn.Conv2d(last, last, 1))


def controlnet_config(
    unet_config: Mapping[str, Any],
    stem_widths: Sequence[int] = STEM_WIDTHS,
    conditioning_channels: int = 3,
    mid_block: MidBlock = "as_unet",
) -> dict[str, Any]:
    """The config of a ControlNet for a U-Net.

    Args:
        unet_config: config of the U-Net; missing entries have the defaults of `UNet2DConditionModel`.
        stem_widths: widths of the stem's convolutions; each after the first halves the resolution.
        conditioning_channels: channels of the condition images.
        mid_block: where the ControlNet's mid block comes from.
    """
    defaults = {name: one.default for name, one in _parameters(UNet2DConditionModel).items()}
    known = defaults | dict(unet_config)
    config = {name: _short(known[name], name) for name in _encoder_settings()}
    if mid_block == "added":
        config["mid_block_type"] = _MID_BLOCKS[0]
    return config | {
        "conditioning_channels": conditioning_channels,
        "conditioning_embedding_out_channels": tuple(stem_widths),
    }


def build_controlnet(config: Mapping[str, Any], seed: int = 0) -> ControlNetModel:
    """A ControlNet of a config, with random weights: diffusers' class where that is able to, else `StudentControlNet`.

    Args:
        config: arguments of the class; names with an underscore in front are ignored.
        seed: of the weights, which are thus equal on every rank.

    Raises:
        ValueError: for a config that has entries of another network.
    """
    settings = {name: value for name, value in config.items() if not name.startswith("_")}
    unknown = sorted(set(settings) - set(_parameters(StudentControlNet)))
    if unknown:
        raise ValueError(
            f"a ControlNet has no setting {', '.join(unknown)}; was this config.json written for one?"
        )
    kind = ControlNetModel if is_stock(settings) else StudentControlNet
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(**settings)


def is_stock(config: Mapping[str, Any]) -> bool:
    """Whether diffusers' own `ControlNetModel` can have this config."""
    depths = config["transformer_layers_per_block"]
    return (
        config["mid_block_type"] in _MID_BLOCKS
        and isinstance(config["layers_per_block"], int)
        and isinstance(config["cross_attention_dim"], int)
        and (isinstance(depths, int) or all(isinstance(depth, int) for depth in depths))
    )


def controlnet_from_unet(
    unet: UNet2DConditionModel,
    stem_widths: Sequence[int] = STEM_WIDTHS,
    conditioning_channels: int = 3,
    mid_block: MidBlock = "as_unet",
    stem_init: StemInit = "zero",
    seed: int = 0,
) -> ControlNetModel:
    """A ControlNet whose encoder is a copy of the U-Net's; all its residuals are 0.

    Args:
        unet: any U-Net of the SD or SDXL kind; not changed.
        stem_widths: as in `controlnet_config`.
        conditioning_channels: channels of the condition images.
        mid_block: where the ControlNet's mid block comes from.
        stem_init: how the stem starts.
        seed: of the stem's weights, and of those of an added mid block.
    """
    config = controlnet_config(unet.config, stem_widths, conditioning_channels, mid_block)
    controlnet = build_controlnet(config, seed)
    if stem_init == "he":
        _he_init(controlnet.controlnet_cond_embedding, seed)
    # Adapters of the U-Net start at zero; peft keeps the weight under them as base_layer.
    weights = {name.replace(".base_layer.", "."): value for name, value in unet.state_dict().items()}
    copied = {name: weights[name] for name in controlnet.state_dict() if name in weights}
    report = controlnet.load_state_dict(copied, strict=False)
    new = ("controlnet_", "mid_block." if mid_block == "added" else "controlnet_")
    left_out = [name for name in report.missing_keys if not name.startswith(new)]
    assert not left_out, f"not copied from the U-Net: {left_out}"
    return controlnet


def _he_init(stem: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for layer in stem.modules():
        if isinstance(layer, nn.Conv2d) and not layer.weight.is_meta:
            nn.init.kaiming_normal_(layer.weight, generator=generator)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)


def load_controlnet(source: str | Path) -> ControlNetModel:
    """Loads a ControlNet in float32, of diffusers' class or a `StudentControlNet`.

    Args:
        source: folder with config.json and safetensors, or hub id (`org/name`).

    Returns:
        The ControlNet; on the meta device, without weights, if that is the default device.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: for another network, pickles or unreadable weights.
    """
    folder = controlnet_folder(source)
    config = read_json(folder / "config.json")
    if config.get("_class_name") not in ("ControlNetModel", "StudentControlNet"):
        raise ValueError(
            f"'{source}' holds a {config.get('_class_name')}, expected a ControlNetModel or a StudentControlNet."
        )
    defaults = {name: one.default for name, one in _parameters(StudentControlNet).items()}
    stock = {name: one.default for name, one in _parameters(ControlNetModel).items()}
    settings = {name: config.get(name, stock.get(name, defaults[name])) for name in defaults}
    if torch.get_default_device().type == "meta":
        return build_controlnet(settings)
    return load_network(ControlNetModel if is_stock(settings) else StudentControlNet, folder, strict=True)


def save_controlnet(
    controlnet: ControlNetModel, folder: str | Path, dtype: torch.dtype = torch.float16
) -> None:
    """Writes a ControlNet folder; casts the ControlNet to `dtype`."""
    nn.Module.to(controlnet, dtype=dtype)  # the override of diffusers warns about every cast
    controlnet.save_pretrained(folder, safe_serialization=True)


def plain_controlnet(controlnet: ControlNetModel, weights: Mapping[str, Tensor]) -> ControlNetModel:
    """A new ControlNet of the same config with the given weights: no hooks, no shards, adapters merged."""
    copy = build_controlnet(controlnet.config)
    copy.load_state_dict(merged_weights(cast(UNet2DConditionModel, controlnet), weights))
    return copy


def stock_controlnet(controlnet: ControlNetModel) -> ControlNetModel:
    """A ControlNet of diffusers' class with the same residuals, for programs that know no other.

    A missing mid block becomes a ResNet whose last convolution is zero, which returns its input: bit-equal residuals, at the
    cost of the ResNet's weights and time.

    Raises:
        ValueError: if the layers differ by stage, which diffusers' class cannot express.
    """
    config = {name: value for name, value in controlnet.config.items() if not name.startswith("_")}
    config["mid_block_type"] = config["mid_block_type"] or "UNetMidBlock2D"
    if not is_stock(config):
        raise ValueError(
            "diffusers' ControlNetModel needs one layers_per_block and one depth for each stage, got "
            f"{config['layers_per_block']} and {config['transformer_layers_per_block']}; load this one with load_controlnet."
        )
    stock = build_controlnet(config)
    if controlnet.mid_block is None:
        last = stock.mid_block.resnets[-1].conv2
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
    stock.load_state_dict(dict(controlnet.state_dict()), strict=controlnet.mid_block is not None)
    return stock


def skip_widths(network: nn.Module) -> list[int]:
    """Channels of the skip connections of a U-Net, or of the residuals for them of a ControlNet, in order."""
    parts: Any = network
    widths = [parts.conv_in.out_channels]
    for block in parts.down_blocks:
        width = block.resnets[-1].out_channels
        widths += [width] * (len(block.resnets) + (block.downsamplers is not None))
    return widths


def check_fits(controlnet: ControlNetModel, unet: UNet2DConditionModel, named: str) -> None:
    """Checks that a ControlNet has one residual of the right width for each skip connection.

    diffusers would add the residuals that there are, and leave the others out without a word.

    Args:
        controlnet: the ControlNet.
        unet: the network that gets its residuals.
        named: the ControlNet's option and value, for the message.

    Raises:
        ValueError: unless they fit.
    """
    found, wanted = skip_widths(controlnet), skip_widths(unet)
    if found != wanted:
        raise ValueError(
            f"{named} has {len(found)} down residuals of widths {found}, and the U-Net takes {len(wanted)} of {wanted}; a "
            "ControlNet of SD-1.5 has 12 and one of a pruned student fewer, so it has to be trained for this student."
        )
    prompts = controlnet.config["cross_attention_dim"], unet.config["cross_attention_dim"]
    if _short(prompts[0], "") != _short(prompts[1], ""):
        raise ValueError(f"{named} reads prompts of width {prompts[0]}, and the U-Net {prompts[1]}.")
    kinds = [
        "SDXL" if one.config["addition_embed_type"] == "text_time" else "SD" for one in (controlnet, unet)
    ]
    if kinds[0] != kinds[1]:
        raise ValueError(f"{named} is of the kind of {kinds[0]}, and the U-Net of that of {kinds[1]}.")


def check_stem(controlnet: ControlNetModel, factor: int, named: str, latents: str = "the latents") -> None:
    """Checks that the stem brings condition images of the images' size to the size of the latents.

    Args:
        controlnet: the ControlNet.
        factor: how many times smaller the latents are than images.
        named: the ControlNet's option and value, for the message.
        latents: whose latents they are, for the message.

    Raises:
        ValueError: unless it does.
    """
    widths = controlnet.config["conditioning_embedding_out_channels"]
    if 2 ** (len(widths) - 1) != factor:
        raise ValueError(
            f"the stem {list(widths)} of {named} makes condition images {2 ** (len(widths) - 1)} times smaller, and {latents} "
            f"are {factor} times smaller than images; give {factor.bit_length()} stem_widths, or another ControlNet."
        )


def check_reads_rgb(controlnet: ControlNetModel, named: str) -> None:
    """Raises ValueError unless the condition images have the three channels of those that are read from files."""
    channels = controlnet.config["conditioning_channels"]
    if channels != 3:
        raise ValueError(
            f"{named} reads condition images of {channels} channel(s), and these have 3; train one with "
            "controlnet.conditioning_channels 3."
        )


def _encoder_settings() -> list[str]:
    """Names of the settings that a ControlNet shares with a U-Net."""
    shared = _parameters(StudentControlNet).keys() & _parameters(UNet2DConditionModel).keys()
    return [name for name in _parameters(StudentControlNet) if name in shared]


def _encoder_parts(settings: Mapping[str, Any]) -> dict[str, nn.Module | None]:
    """The modules of a U-Net's encoder, with random weights, without making its decoder."""
    device, stages = torch.get_default_device(), len(settings["down_block_types"])
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            **settings,
            up_block_types=("UpBlock2D",) * stages,
            reverse_transformer_layers_per_block=[1] * stages,
        )
    names = (*_ENCODER, *(name for name in _ADDED if hasattr(unet, name)), "down_blocks", "mid_block")
    parts = {name: cast(nn.Module | None, getattr(unet, name)) for name in names}
    for part in parts.values():
        if part is None:
            continue
        part.to_empty(device=device)
        for layer in part.modules():
            if callable(reset := getattr(layer, "reset_parameters", None)) and device.type != "meta":
                reset()
    return parts


def _short(value: Any, name: str) -> Any:
    """One number where a list has equal ones, as diffusers' class takes it; lists of widths and types stay."""
    if name in ("block_out_channels", "down_block_types") or not isinstance(value, list | tuple):
        return value
    first = value[0]
    return (
        first if all(one == first for one in value) and not isinstance(first, list | tuple) else list(value)
    )


def _parameters(network: type[nn.Module]) -> dict[str, inspect.Parameter]:
    parameters = dict(inspect.signature(network.__init__).parameters)
    parameters.pop("self")
    return parameters


def controlnet_folder(source: str | Path) -> Path:
    """The folder of a ControlNet, fetched if it is on the hub.

    Raises:
        FileNotFoundError: if there is none.
    """
    path = Path(source)
    if (path / "config.json").is_file():
        return path
    if not path.exists() and is_hub_id(str(source)):
        return hub.fetch(str(source), "config.json", ("",))
    raise FileNotFoundError(
        f"there is no ControlNet in '{source}': expected a folder with config.json and diffusion_pytorch_model.safetensors, "
        "or a hub id (org/name)."
    )
