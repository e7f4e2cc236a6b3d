"""Models of full architecture with random weights, as diffusers folders: speed and memory do not depend on the values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from evaluation.benchmarks.full_size import (
    BIG_G,
    CLIP_L,
    SCHEDULER,
    VAE,
    sd15_unet_config,
    sdxl_unet_config,
)
from sdxs_lightning.core.errors import UserError
from sdxs_lightning.export import new_folder
from sdxs_lightning.surgery.config import prune_config
from sdxs_lightning.surgery.presets import PRESETS

_STUDENTS = {"sdxs-512", "sdxs-1024", "tiny"}
_TINY_UNET = {
    "sample_size": 8,
    "block_out_channels": [32, 32],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "mid_block_type": None,
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "cross_attention_dim": 32,
    "addition_embed_type": None,
}
_TINY_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": 32,
}


def random_model(name: str, work: Path) -> Path:
    """The folder of a model; written at the first call, in half precision.

    Args:
        name: "sdxs-512" (of SD-1.5), "sdxs-1024", "sd15", "sdxl", or "tiny" for tests. Students have a tiny decoder, and the KL
            VAE in vae_large.
        work: folder that keeps it.

    Raises:
        UserError: for another name.
    """
    folder = work / f"random-{name}"
    if (folder / "model_index.json").is_file():
        return folder
    if name not in ("sdxs-512", "sdxs-1024", "sd15", "sdxl", "tiny"):
        raise UserError(f"there is no architecture '{name}', and no folder of that name.")
    with new_folder(folder) as written:
        torch.manual_seed(0)
        _write(name, written)
    return folder


def unet_config(name: str) -> dict[str, Any]:
    """Config of the U-Net of a model."""
    if name == "tiny":
        return sd15_unet_config() | _TINY_UNET
    complete = sdxl_unet_config() if name in ("sdxl", "sdxs-1024") else sd15_unet_config()
    return prune_config(complete, PRESETS[name]) if name in PRESETS else complete


def _write(name: str, folder: Path) -> None:
    import diffusers
    import transformers

    sdxl = name in ("sdxl", "sdxs-1024")
    tiny = name == "tiny"
    config = unet_config(name)
    unet = diffusers.UNet2DConditionModel(
        **{key: value for key, value in config.items() if not key.startswith("_")}
    )
    scale = {"scaling_factor": 0.13025 if sdxl else 0.18215, "force_upcast": sdxl}
    changes = {"block_out_channels": [8] * 4, "norm_num_groups": 4, "layers_per_block": 1} if tiny else {}
    kl = diffusers.AutoencoderKL.from_config(VAE | scale | changes)
    parts: dict[str, Any] = {
        "unet": unet,
        "vae": diffusers.AutoencoderTiny() if name in _STUDENTS else kl,
        "text_encoder": _text_encoder(transformers.CLIPTextModel, CLIP_L | (_TINY_TEXT if tiny else {})),
        "tokenizer": _tokenizer(),
        "scheduler": _scheduler(diffusers, name, 400 if sdxl else 1000),
    }
    if sdxl:
        parts["text_encoder_2"] = _text_encoder(transformers.CLIPTextModelWithProjection, BIG_G)
        parts["tokenizer_2"] = _tokenizer()
        pipeline = diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)
    else:
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipeline = diffusers.StableDiffusionPipeline(**parts)
    for network in (*pipeline.components.values(), kl):
        if isinstance(network, torch.nn.Module):
            torch.nn.Module.half(network)
    pipeline.save_pretrained(folder, safe_serialization=True)
    if name in _STUDENTS:
        kl.save_pretrained(folder / "vae_large", safe_serialization=True)
    for file in folder.glob("text_encoder*/config.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"dtype": "float32"}))


def _scheduler(diffusers: Any, name: str, student_timesteps: int) -> Any:
    if name not in _STUDENTS:
        return diffusers.DDIMScheduler(**SCHEDULER, clip_sample=False, steps_offset=1)
    settings = SCHEDULER | {"num_train_timesteps": student_timesteps}
    return diffusers.DDIMScheduler(**settings, clip_sample=False, steps_offset=1, timestep_spacing="trailing")


def _text_encoder(kind: Any, config: dict[str, Any]) -> Any:
    import transformers

    return kind(transformers.CLIPTextConfig.from_dict(config))


def _tokenizer() -> Any:
    """The toy world's words; prompts are padded to 77 tokens whatever they say."""
    from data.toy.tokenizer import build_tokenizer

    tokenizer = build_tokenizer()
    tokenizer.model_max_length = 77
    return tokenizer
