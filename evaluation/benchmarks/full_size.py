"""The released bases without weights: configs of their networks, as Python and as a diffusers folder.

Only what differs from the class's defaults, and what the surgery and the memory plan read. Counted on the meta device:
859,520,964 parameters for SD-1.5, 865,910,724 for SD-2.1, 2,567,463,684 for SDXL.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def sd15_unet_config() -> dict[str, Any]:
    """Stable Diffusion 1.5: four stages, 8 heads everywhere, 1x1 convolutions around the Transformers."""
    return {
        "sample_size": 64,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": [320, 640, 1280, 1280],
        "layers_per_block": 2,
        "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    }


def sd21_unet_config() -> dict[str, Any]:
    """Stable Diffusion 2.1-base: OpenCLIP-H prompts, heads of 64 channels, linear projections."""
    return sd15_unet_config() | {
        "cross_attention_dim": 1024,
        "attention_head_dim": [5, 10, 20, 20],
        "use_linear_projection": True,
    }


def sdxl_unet_config() -> dict[str, Any]:
    """Stable Diffusion XL 1.0: three stages, Transformers of depth 2 and 10, pooled and size conditioning."""
    return {
        "sample_size": 128,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": [320, 640, 1280],
        "layers_per_block": 2,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 10],
        "cross_attention_dim": 2048,
        "attention_head_dim": [5, 10, 20],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }


VAE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}
CLIP_L = {
    "architectures": ["CLIPTextModel"],
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "vocab_size": 49408,
    "projection_dim": 768,
}
BIG_G = CLIP_L | {
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
}


def save_configs(kind: str, folder: Path) -> Path:
    """Writes the JSON files of "sd15" or "sdxl" as a diffusers folder, without a single weight."""
    base = folder / f"{kind}-configs"
    sdxl = kind == "sdxl"
    files: dict[str, dict[str, Any]] = {
        "model_index.json": {"_class_name": f"StableDiffusion{'XL' if sdxl else ''}Pipeline"},
        "unet/config.json": sdxl_unet_config() if sdxl else sd15_unet_config(),
        "vae/config.json": VAE | {"scaling_factor": 0.13025 if sdxl else 0.18215},
        "scheduler/scheduler_config.json": SCHEDULER,
        "text_encoder/config.json": CLIP_L,
        "tokenizer/tokenizer_config.json": {"model_max_length": 77},
    }
    if sdxl:
        files |= {
            "text_encoder_2/config.json": BIG_G,
            "tokenizer_2/tokenizer_config.json": {"model_max_length": 77},
        }
    for name, content in files.items():
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text(json.dumps(content))
    return base
