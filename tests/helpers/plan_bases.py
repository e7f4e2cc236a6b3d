"""Bases of full size without weights, for memory plans."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.helpers.full_size import sd15_unet_config, sdxl_unet_config

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
    """Writes the JSON files of "sd15" or "sdxl" as a diffusers folder, without weights."""
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
