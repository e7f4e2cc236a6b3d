"""A diffusers pipeline's weights under the names of the original code (LDM for SD, sgm for SDXL), as single files have them.

The inverse of what loaders do, written from the original networks: the U-Net is numbered blocks, the VAE counts its up
stages from the output, OpenCLIP keeps query, key and value in one matrix.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor

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
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def save_single_file(pipeline: DiffusionPipeline, file: Path) -> Path:
    """Writes a pipeline of SD-1.x, SD-2.x (open_clip encoder, if it pads with "!") or SDXL kind as one file."""
    tensors = {f"model.diffusion_model.{name}": value for name, value in ldm_unet(pipeline.unet).items()}
    tensors |= {f"first_stage_model.{name}": value for name, value in ldm_vae(pipeline.vae).items()}
    if hasattr(pipeline, "text_encoder_2"):
        tensors |= hf_clip("conditioner.embedders.0.transformer.", pipeline.text_encoder.state_dict())
        tensors |= open_clip("conditioner.embedders.1.model.", pipeline.text_encoder_2.state_dict())
    elif pipeline.tokenizer.pad_token == "!":
        tensors |= open_clip("cond_stage_model.model.", pipeline.text_encoder.state_dict())
    else:
        tensors |= hf_clip("cond_stage_model.transformer.", pipeline.text_encoder.state_dict())
    # Real files also hold what was training state.
    tensors |= {"alphas_cumprod": torch.ones(1000), "model_ema.decay": torch.tensor(0.9999)}
    save_file({name: value.contiguous() for name, value in tensors.items()}, file)
    return file


def ldm_unet(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """Blocks in one row: resnets and downsamplers of the down path, then of the up path, counted from 0."""
    per_stage = int(unet.config.layers_per_block) + 1
    attends = ["CrossAttn" in kind for kind in unet.config.up_block_types]

    def renamed(name: str) -> str:
        for ours, theirs in _UNET_TOP.items():
            if name.startswith(f"{ours}."):
                return name.replace(ours, theirs)
        match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+?)\.(\d+)\.(.+)", name)
        if match is None:
            match = re.fullmatch(r"mid_block()\.?()(\w+?)\.(\d+)\.(.+)", name)
        assert match is not None, name
        side, stage, kind, layer, rest = match.groups()
        inner = _replaced(rest, _RESNET) if kind == "resnets" else rest
        if not side:
            return f"middle_block.{2 * int(layer) if kind == 'resnets' else 1}.{inner}"
        first = int(stage) * per_stage
        if side == "down":
            if kind == "downsamplers":
                return f"input_blocks.{first + per_stage}.0.op.{rest.removeprefix('conv.')}"
            return f"input_blocks.{first + 1 + int(layer)}.{0 if kind == 'resnets' else 1}.{inner}"
        if kind == "upsamplers":
            return f"output_blocks.{first + per_stage - 1}.{2 if attends[int(stage)] else 1}.{rest}"
        return f"output_blocks.{first + int(layer)}.{0 if kind == 'resnets' else 1}.{inner}"

    return {renamed(name): value for name, value in unet.state_dict().items()}


def ldm_vae(vae: AutoencoderKL) -> dict[str, Tensor]:
    """Attention as 1x1 convolutions; up stages counted from the output."""
    last = len(vae.config.block_out_channels) - 1
    tensors = {}
    for name, value in vae.state_dict().items():
        renamed = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        renamed = re.sub(
            r"down_blocks\.(\d+)\.(?:resnets\.(\d+)|downsamplers\.0)",
            lambda m: f"down.{m[1]}." + (f"block.{m[2]}" if m[2] else "downsample"),
            renamed,
        )
        renamed = re.sub(
            r"up_blocks\.(\d+)\.(?:resnets\.(\d+)|upsamplers\.0)",
            lambda m: f"up.{last - int(m[1])}." + (f"block.{m[2]}" if m[2] else "upsample"),
            renamed,
        )
        renamed = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", renamed)
        if "mid_block.attentions.0" in renamed:
            renamed = _replaced(renamed.replace("mid_block.attentions.0", "mid.attn_1"), _VAE_ATTENTION)
            value = value[:, :, None, None] if value.ndim == 2 else value
        tensors[renamed] = value
    return tensors


def hf_clip(prefix: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The text encoder of SD-1.x: transformers' own names of 2022, with the buffer that they had."""
    tensors = {
        f"{prefix}text_model.{name.removeprefix('text_model.')}": value for name, value in weights.items()
    }
    return tensors | {f"{prefix}text_model.embeddings.position_ids": torch.arange(77)[None]}


def open_clip(prefix: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The text encoder of SD-2.x and SDXL's second: open_clip's names, projection transposed."""
    names = {
        "embeddings.token_embedding.weight": "token_embedding.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
        "final_layer_norm.weight": "ln_final.weight",
        "final_layer_norm.bias": "ln_final.bias",
    }
    plain = {name.removeprefix("text_model."): value for name, value in weights.items()}
    tensors = {prefix + theirs: plain[ours] for ours, theirs in names.items()}
    width = len(plain["final_layer_norm.bias"])
    projection = plain.get("text_projection.weight", torch.zeros(width, width))
    tensors[f"{prefix}text_projection"] = projection.T
    tensors[f"{prefix}logit_scale"] = torch.tensor(4.6)
    layers = 1 + max(int(match[1]) for name in plain if (match := re.match(r"encoder\.layers\.(\d+)", name)))
    inner = {
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
        "self_attn.out_proj": "attn.out_proj",
    }
    for layer in range(layers):
        ours, theirs = f"encoder.layers.{layer}", f"{prefix}transformer.resblocks.{layer}"
        for kind in ("weight", "bias"):
            qkv = [plain[f"{ours}.self_attn.{one}_proj.{kind}"] for one in "qkv"]
            tensors[f"{theirs}.attn.in_proj_{kind}"] = torch.cat(qkv)
            tensors |= {f"{theirs}.{new}.{kind}": plain[f"{ours}.{old}.{kind}"] for old, new in inner.items()}
    return tensors


def _replaced(name: str, words: Mapping[str, str]) -> str:
    for ours, theirs in words.items():
        name = re.sub(rf"(^|\.){re.escape(ours)}\.", rf"\g<1>{theirs}.", name)
    return name
