"""Released models at tiny size: their configs, schedulers and file layouts, with random weights.

The settings are those of the published configs of SD-1.5, SD-2.1-base, SD-2.1, SDXL, SSD-1B, Vega and SDXS; only
widths and depths are small.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer

from tests.helpers.tiny import (
    PROMPT_TOKENS,
    save_tiny_sd,
    save_tiny_sdxl,
    tiny_sd_unet,
    tiny_sdxl_unet,
    tiny_text_encoder,
    tiny_tokenizer,
)

_PNDM = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.8.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
"""SD-1.5's scheduler: it does not name its prediction type."""


def save_release(name: str, path: Path) -> Path:
    """Writes the folder of one of RELEASES."""
    return RELEASES[name](path)


def save_sd15(path: Path) -> Path:
    """Eight heads everywhere, 1x1 convolutions around attention, a scheduler without prediction_type."""
    save_tiny_sd(path)
    _as_pndm(path, _PNDM)
    _old_tokenizer(path / "tokenizer", tiny_tokenizer())
    # Released before these existed.
    config = _json(path / "unet" / "config.json")
    for newer in (
        "mid_block_type",
        "use_linear_projection",
        "transformer_layers_per_block",
        "upcast_attention",
    ):
        config.pop(newer)
    _as_json(path / "unet" / "config.json", config)
    vae = _json(path / "vae" / "config.json")
    del vae["scaling_factor"]
    _as_json(path / "vae" / "config.json", vae)
    return path


def save_sd21_base(path: Path, prediction_type: str = "epsilon", sample_size: int = 16) -> Path:
    """Heads that grow with width, linear projections, a text encoder with gelu, "!" as padding."""
    save_tiny_sd(path)
    settings = {
        "attention_head_dim": [2, 2, 3],
        "use_linear_projection": True,
        "sample_size": sample_size,
        "upcast_attention": prediction_type == "v_prediction",
    }
    unet_like(tiny_sd_unet(), **settings).save_pretrained(path / "unet")
    _as_pndm(path, _PNDM | {"prediction_type": prediction_type})
    tokenizer = tiny_tokenizer("!")
    config = tiny_text_encoder(tokenizer).config
    config.hidden_act = "gelu"
    torch.manual_seed(0)
    CLIPTextModel(config).save_pretrained(path / "text_encoder")
    _old_tokenizer(path / "tokenizer", tokenizer)
    return path


def save_sd21(path: Path) -> Path:
    """v-prediction, half as many pixels again a side (768 instead of 512), attention in float32."""
    return save_sd21_base(path, "v_prediction", 24)


def save_sdxl(path: Path) -> Path:
    """Linear projections, depths per stage, an Euler scheduler, two old tokenizers with different padding."""
    save_tiny_sdxl(path)
    unet_like(
        tiny_sdxl_unet(), transformer_layers_per_block=[1, 2, 3], attention_head_dim=[2, 2, 3]
    ).save_pretrained(path / "unet")
    _old_tokenizer(path / "tokenizer", tiny_tokenizer())
    _old_tokenizer(path / "tokenizer_2", tiny_tokenizer("!"))
    return path


def save_vega(path: Path) -> Path:
    """SDXL with depths 1, 1, 2 and a mid block without attention."""
    save_sdxl(path)
    unet_like(
        tiny_sdxl_unet(),
        transformer_layers_per_block=[1, 1, 2],
        attention_head_dim=[2, 2, 3],
        mid_block_type="UNetMidBlock2D",
    ).save_pretrained(path / "unet")
    return path


def save_ssd1b(path: Path) -> Path:
    """SDXL with another depth in each transformer, down and up."""
    save_sdxl(path)
    unet_like(
        tiny_sdxl_unet(),
        transformer_layers_per_block=[1, [2], [3]],
        reverse_transformer_layers_per_block=[[3, 1], [2, 1], 1],
        attention_head_dim=[2, 2, 3],
        mid_block_type=None,
    ).save_pretrained(path / "unet")
    return path


def save_sdxs(path: Path) -> Path:
    """SDXS-512-0.9: no mid block, cross-attention alone in two stages; a tiny `vae`, the KL one in `vae_large`."""
    save_sd21_base(path)
    student = unet_like(
        tiny_sd_unet(),
        mid_block_type=None,
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        only_cross_attention=[True, False, False],
        attention_head_dim=[4, 4, 4],
        use_linear_projection=True,
    )
    student.save_pretrained(path / "unet")
    shutil.move(path / "vae", path / "vae_large")
    tiny_decoder().save_pretrained(path / "vae")
    index = _json(path / "model_index.json")
    _as_json(path / "model_index.json", index | {"vae": ["diffusers", "AutoencoderTiny"]})
    config = _json(path / "vae" / "config.json")
    del config["block_out_channels"]  # written by later versions only
    _as_json(path / "vae" / "config.json", config)
    return path


RELEASES = {
    "sd15": save_sd15,
    "sd21-base": save_sd21_base,
    "sd21": save_sd21,
    "sdxl": save_sdxl,
    "vega": save_vega,
    "ssd-1b": save_ssd1b,
    "sdxs": save_sdxs,
}


def tiny_decoder() -> AutoencoderTiny:
    """An AutoencoderTiny that halves the resolution, as `tests.helpers.tiny.tiny_vae` does."""
    torch.manual_seed(0)
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).eval()


def unet_like(like: UNet2DConditionModel, **changes: Any) -> UNet2DConditionModel:
    """A network of the same settings but for some, with fresh weights."""
    settings = {name: value for name, value in like.config.items() if not name.startswith("_")}
    torch.manual_seed(1)
    return UNet2DConditionModel(**(settings | changes)).eval()


def only_fp16(base: Path) -> Path:
    """Renames all weights to those of the fp16 variant, in half precision."""
    for file in base.rglob("*.safetensors"):
        halved = {name: value.half() for name, value in load_file(file).items()}
        save_file(halved, file.with_name(f"{file.stem}.fp16.safetensors"), metadata={"format": "pt"})
        file.unlink()
    return base


def only_pickles(folder: Path) -> Path:
    """Replaces the weights by an empty pickle, which must not be opened."""
    for file in folder.glob("*.safetensors"):
        file.with_name("diffusion_pytorch_model.bin").write_bytes(b"never to be read")
        file.unlink()
    return folder


def _as_pndm(base: Path, config: dict[str, Any]) -> None:
    _as_json(base / "scheduler" / "scheduler_config.json", config)
    index = _json(base / "model_index.json")
    _as_json(base / "model_index.json", index | {"scheduler": ["diffusers", "PNDMScheduler"]})


def _old_tokenizer(folder: Path, tokenizer: CLIPTokenizer) -> None:
    """The files of 2022: vocabulary, merges, and a padding token on which two files differ (the map's is right)."""
    tokenizer.save_pretrained(folder)
    model = _json(folder / "tokenizer.json")["model"]
    shutil.rmtree(folder)
    folder.mkdir()
    _as_json(folder / "vocab.json", model["vocab"])
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    start, end = (_special(token) for token in ("<|startoftext|>", "<|endoftext|>"))
    special = {"bos_token": start, "eos_token": end, "unk_token": end}
    _as_json(folder / "special_tokens_map.json", special | {"pad_token": tokenizer.pad_token})
    tagged = {name: value | {"__type": "AddedToken"} for name, value in special.items()}
    settings = {
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": PROMPT_TOKENS,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "CLIPTokenizer",
    }
    _as_json(folder / "tokenizer_config.json", tagged | settings)


def _special(token: str) -> dict[str, Any]:
    return {"content": token, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}


def _json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def _as_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2))
