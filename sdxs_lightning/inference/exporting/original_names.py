"""A student's weights under the names of the original code: LDM for SD, sgm for SDXL, as single files have them.

The U-Net is one row of numbered blocks on each side, the KL VAE counts its up stages from the output, OpenCLIP keeps query, key
and value in one matrix. Pruned U-Nets are numbered in two ways:

- consecutively, as the original code would number a network of fewer blocks: diffusers' single-file loader and ComfyUI read it;
- at the places of the complete network's blocks (three numbers a stage), with gaps: stable-diffusion.cpp reads it, since its
  users convert with diffusers' script convert_diffusers_to_original_stable_diffusion.py, which numbers so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sdxs_lightning.core.errors import UserError

_UNET_TOP = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_BLOCK = re.compile(
    r"(?P<side>down|up)_blocks\.(?P<stage>\d+)\.(?P<kind>resnets|attentions|downsamplers|upsamplers)\.(?P<layer>\d+)\.(?P<rest>.+)"
)
_MID = re.compile(r"mid_block\.(?P<kind>resnets|attentions)\.(?P<layer>\d+)\.(?P<rest>.+)")
COMPLETE_LAYERS = 2
"""layers_per_block of the complete networks, SD-1.5's to SDXL's."""


def original_unet(
    config: Mapping[str, Any], weights: Mapping[str, Tensor], gaps: bool = False
) -> dict[str, Tensor]:
    """Renames the weights of a U-Net; tensors are shared.

    Args:
        config: the U-Net's.
        weights: its state dict.
        gaps: number blocks at their places in the complete network.

    Raises:
        UserError: for stages of different numbers of layers, which the original layout has no numbers for.
    """
    layers = config["layers_per_block"]
    if not isinstance(layers, int):
        raise UserError(
            f"the U-Net has layers_per_block {list(layers)}, and single files need one number for all stages; export it for "
            "onnx or openvino."
        )
    attends = ["CrossAttn" in kind for kind in config["up_block_types"]]
    width = (COMPLETE_LAYERS if gaps else layers) + 1
    return {
        f"model.diffusion_model.{_unet_name(name, layers, width, attends, gaps)}": value
        for name, value in weights.items()
    }


def _unet_name(name: str, layers: int, width: int, attends: list[bool], gaps: bool) -> str:
    """The original name; `width` numbers a stage."""
    for ours, theirs in _UNET_TOP.items():
        if name.startswith(f"{ours}."):
            return f"{theirs}{name.removeprefix(ours)}"
    if mid := _MID.fullmatch(name):
        layer = int(mid["layer"])
        if mid["kind"] == "attentions":
            return f"middle_block.{2 * layer + 1}.{mid['rest']}"
        return f"middle_block.{2 * layer}.{_resnet(mid['rest'])}"
    block = _BLOCK.fullmatch(name)
    if block is None:
        raise UserError(
            f"the U-Net's tensor '{name}' has no name in the original layout of Stable Diffusion."
        )
    stage, layer, kind, rest = int(block["stage"]), int(block["layer"]), block["kind"], block["rest"]
    first = stage * width
    inner = f"0.{_resnet(rest)}" if kind == "resnets" else f"1.{rest}"
    if kind == "downsamplers":
        return f"input_blocks.{first + width}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        # Of the complete network only the first up stage has no attention before its upsampler.
        place, after = (first + width - 1, stage > 0) if gaps else (first + layers, attends[stage])
        return f"output_blocks.{place}.{2 if after else 1}.{rest}"
    return f"{'input' if block['side'] == 'down' else 'output'}_blocks.{first + layer + (block['side'] == 'down')}.{inner}"


def _resnet(rest: str) -> str:
    layer, _, kind = rest.rpartition(".")
    return f"{_RESNET[layer]}.{kind}"


_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def original_vae(stages: int, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames the weights of a KL VAE with a number of stages; attention becomes 1x1 convolutions."""
    return dict(_vae_tensor(name, value, stages) for name, value in weights.items())


def _vae_tensor(name: str, value: Tensor, stages: int) -> tuple[str, Tensor]:
    side, _, rest = name.partition(".")
    rest = rest.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    if mid := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)\.(weight|bias)", rest):
        if mid[1] == "resnets":
            return f"first_stage_model.{side}.mid.block_{int(mid[2]) + 1}.{mid[3]}.{mid[4]}", value
        layer = _VAE_ATTENTION[mid[3]]
        image = value[:, :, None, None] if value.ndim == 2 else value
        return f"first_stage_model.{side}.mid.attn_{int(mid[2]) + 1}.{layer}.{mid[4]}", image
    if block := re.fullmatch(
        r"(down|up)_blocks\.(\d+)\.(resnets|downsamplers|upsamplers)\.(\d+)\.(.+)", rest
    ):
        stage = int(block[2]) if block[1] == "down" else stages - 1 - int(block[2])
        inner = {"resnets": f"block.{block[4]}", "downsamplers": "downsample", "upsamplers": "upsample"}[
            block[3]
        ]
        rest = f"{block[1]}.{stage}.{inner}.{block[5]}"
    return f"first_stage_model.{side}.{rest}", value


def original_clip(prefix: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A text encoder of SD-1.x, or SDXL's first: transformers' names of that time."""
    return {
        f"{prefix}text_model.{name.removeprefix('text_model.')}": value for name, value in weights.items()
    }


_OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def original_open_clip(prefix: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A text encoder of SD-2.x, or SDXL's second: open_clip's names, query, key and value in one, projection transposed."""
    plain = {name.removeprefix("text_model."): value for name, value in weights.items()}
    tensors = {f"{prefix}{theirs}": plain.pop(ours) for ours, theirs in _OPEN_CLIP.items()}
    width = len(tensors[f"{prefix}ln_final.bias"])
    # SD-2.x encoders were saved without their projection, which the file has and nobody uses.
    projection = plain.pop(
        "text_projection.weight", torch.eye(width, dtype=tensors[f"{prefix}ln_final.bias"].dtype)
    )
    tensors[f"{prefix}text_projection"] = projection.T
    plain.pop("embeddings.position_ids", None)
    for name, value in plain.items():
        layer = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        assert layer is not None, name
        block = f"{prefix}transformer.resblocks.{layer[1]}"
        if layer[2] in _OPEN_CLIP_LAYER:
            tensors[f"{block}.{_OPEN_CLIP_LAYER[layer[2]]}.{layer[3]}"] = value
        elif layer[2] == "self_attn.q_proj":
            rows = [plain[f"encoder.layers.{layer[1]}.self_attn.{one}_proj.{layer[3]}"] for one in "qkv"]
            tensors[f"{block}.attn.in_proj_{layer[3]}"] = torch.cat(rows)
    return tensors


def taesd(weights: Mapping[str, Tensor], side: str) -> dict[str, Tensor]:
    """The encoder or decoder of an AutoencoderTiny under TAESD's names: a sequence whose decoder begins with a clamp."""
    offset = 1 if side == "decoder" else 0
    tensors = {}
    for name, value in weights.items():
        if name.startswith(f"{side}.layers."):
            number, _, rest = name.removeprefix(f"{side}.layers.").partition(".")
            tensors[f"{int(number) + offset}.{rest}"] = value
    return tensors
