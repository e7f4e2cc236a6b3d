"""Tiny U-Nets built like the released bases, and how to call and compare them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from tests.helpers.tiny import SD_DIM, SDXL_DIM, SDXL_POOLED_DIM, SDXL_TIME_ID_DIM

_COMMON: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 4,
}

SD: dict[str, Any] = _COMMON | {
    # Widths 1 : 2 : 4 : 4 as in SD-1.5, each divisible by the 8 heads of sdxs-512-0.9.
    "block_out_channels": [8, 16, 32, 32],
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
    "cross_attention_dim": SD_DIM,
    "attention_head_dim": 2,
}
"""Four stages as SD-1.5 has them."""

SD2: dict[str, Any] = SD | {"attention_head_dim": [1, 2, 4, 4], "use_linear_projection": True}
"""Heads of equal size and linear projections as in SD-2.1."""

SDXL: dict[str, Any] = _COMMON | {
    "block_out_channels": [8, 16, 32],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "cross_attention_dim": SDXL_DIM,
    "attention_head_dim": [1, 2, 4],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": SDXL_TIME_ID_DIM,
    "projection_class_embeddings_input_dim": 6 * SDXL_TIME_ID_DIM + SDXL_POOLED_DIM,
}
"""Three stages as SDXL has them, with its Transformer depths."""

CONFIGS = {"sd": SD, "sd2": SD2, "sdxl": SDXL}

PAIRS = [
    ("sd", "sdxs-512"),
    ("sd2", "sdxs-512"),
    ("sd", "sdxs-512-0.9"),
    ("sd2", "sdxs-512-0.9"),
    ("sd", "bk-base"),
    ("sd", "bk-small"),
    ("sd", "bk-tiny"),
    ("sd2", "bk-tiny"),
    ("sdxl", "sdxs-1024"),
    ("sdxl", "koala-700m"),
    ("sdxl", "ssd-1b"),
]
"""Every preset with the bases that it is for; vega is sdxs-1024 by another name."""


def make_teacher(config: dict[str, Any], seed: int = 0) -> UNet2DConditionModel:
    """A U-Net with random weights; norms and biases too, so that no two tensors are equal by chance."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(**config).eval()
        with torch.no_grad():
            for parameter in unet.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return unet


def inputs_of(unet: UNet2DConditionModel, batch_size: int = 1, seed: int = 1) -> dict[str, Any]:
    """Random arguments of a call, in the U-Net's dtype and on its device."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(unet.device, unet.dtype)

    config = unet.config
    inputs: dict[str, Any] = {
        "sample": draw(batch_size, 4, config.sample_size, config.sample_size),
        "timestep": torch.full((batch_size,), 500, device=unet.device),
        "encoder_hidden_states": draw(batch_size, 5, config.cross_attention_dim),
    }
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {
            "text_embeds": draw(batch_size, pooled),
            "time_ids": draw(batch_size, 6),
        }
    return inputs


@torch.no_grad()
def run(unet: UNet2DConditionModel, **inputs: Any) -> Tensor:
    """The output of a call; `inputs_of(unet)` unless others are given."""
    output: Tensor = unet(**(inputs or inputs_of(unet))).sample
    return output


def load(folder: Path) -> UNet2DConditionModel:
    """What diffusers loads, its weights copied to memory of their own.

    Weights mapped from a file lie at odd addresses, where CPU kernels add in another order: outputs then differ in the last
    bit (measured: up to 8e-7 here) although the weights are equal. A copy is where a new network's weights are.
    """
    unet = UNet2DConditionModel.from_pretrained(folder)
    for parameter in unet.parameters():
        parameter.data = parameter.data.clone()
    return unet


def full_size_inputs(unet: UNet2DConditionModel) -> dict[str, Any]:
    """Arguments of one full-size call: the base's own latents and a prompt of 77 tokens."""
    inputs = inputs_of(unet)
    prompt = torch.randn(1, 77, unet.config.cross_attention_dim, generator=torch.Generator().manual_seed(2))
    return inputs | {"encoder_hidden_states": prompt.to(unet.device, unet.dtype)}
