"""Reading a diffusers folder, with one sentence for each way in which it can be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

# Without low_cpu_mem_usage=False diffusers asks for `accelerate` in a warning per network.
_LOADING: dict[str, Any] = {"torch_dtype": torch.float32, "low_cpu_mem_usage": False}


def check_base(base: str, family: str, pipeline_class: str, components: tuple[str, ...]) -> Path:
    """The folder of a base, if it is one of this family and complete.

    Args:
        base: a diffusers pipeline folder.
        family: class name for the messages.
        pipeline_class: the `_class_name` that `model_index.json` must have.
        components: sub-folders that must be there.

    Raises:
        FileNotFoundError: no such folder, no `model_index.json`, or a component is missing.
        ValueError: a base of another family.
    """
    folder = Path(base)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{family}: there is no folder '{base}'; give a diffusers folder (one with model_index.json) as "
            "family.init_args.base."
        )
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"{family}: '{base}' has no model_index.json, so it is not a diffusers pipeline folder."
        )
    found = read_json(folder / "model_index.json").get("_class_name")
    if found != pipeline_class:
        raise ValueError(
            f"{family}: '{base}' holds a {found}, and this family needs a {pipeline_class}; choose the other "
            "family.class_path."
        )
    missing = [name for name in components if not (folder / name).is_dir()]
    if missing:
        raise FileNotFoundError(f"{family}: '{base}' lacks the component folder(s) {', '.join(missing)}.")
    return folder


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        FileNotFoundError: for a missing file.
        ValueError: for a broken one, named.
    """
    if not path.is_file():
        raise FileNotFoundError(f"'{path}' is missing.")
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"'{path}' is not readable as JSON ({error}); was its download cut off?") from error
    return content


def read_unet(base: Path, folder: str | None, cross_attention_dim: int) -> UNet2DConditionModel:
    """A float32 U-Net from `base/unet`, or from a U-Net folder, or from a pipeline folder's `unet`.

    Raises:
        FileNotFoundError: where none of these is there.
        ValueError: for a U-Net that reads another text encoder.
    """
    path = Path(folder) if folder is not None else base / "unet"
    if not (path / "config.json").is_file():
        path = path / "unet"
    if not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"weights '{folder or base}' is neither a U-Net folder (config.json) nor a pipeline folder (unet/config.json)."
        )
    unet = UNet2DConditionModel.from_pretrained(path, **_LOADING)
    if unet.config.cross_attention_dim != cross_attention_dim:
        raise ValueError(
            f"the U-Net in '{path}' reads prompts of width {unet.config.cross_attention_dim}, and the text encoders of "
            f"'{base}' give {cross_attention_dim}; they are not of one family."
        )
    return unet


def read_vae(base: Path) -> AutoencoderKL:
    """The VAE of a base, float32."""
    return AutoencoderKL.from_pretrained(base / "vae", **_LOADING)


def vae_factor(config: dict[str, Any]) -> int:
    """Pixels per latent, a side."""
    return int(2 ** (len(config["block_out_channels"]) - 1))
