"""What an export says of itself: everything that a caller must know and cannot read from the graphs."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sdxs_lightning.families.folders import card_licence
from sdxs_lightning.inference.exporting.graphs import Adapted
from sdxs_lightning.inference.graph_networks import DOWN_RESIDUAL, MID_RESIDUAL
from sdxs_lightning.inference.model_folder import FORMAT, ModelFolder

Residual = tuple[str, int, int]
"""Input of the U-Net, channels, and how often the sides of the latents are halved (rounded up)."""


def manifest(
    model: ModelFolder,
    runtime: str,
    dtype: str,
    adapted: Adapted,
    residuals: list[Residual],
    licence: str | None,
) -> dict[str, Any]:
    """The manifest of an export; `export_runtime` adds what its comparison with PyTorch found."""
    half_inputs = runtime == "onnx" and dtype == "fp16"
    return {
        "format": FORMAT,
        "runtime": runtime,
        "dtype": dtype,
        "input_dtype": "float16" if half_inputs else "float32",
        "pipeline_class": model.pipeline_class,
        "made_from": model.path.resolve().name,
        "steps": len(model.plan.steps),
        "timesteps": [step.timestep for step in model.plan.steps],
        "prediction_type": model.plan.prediction_type,
        "guidance_scale": 0,
        "negative_prompt": "without effect, since there is no guidance",
        "height": model.size[0],
        "width": model.size[1],
        "size_multiple": max(8, model.factor),
        "latent_channels": model.latent_channels,
        "latent_factor": model.factor,
        "latents": "N(0, 1), unscaled; pred_x0 goes to the decoder as it is: scaling and shift are inside the graphs",
        "decoder_output": "[-1, 1], not clamped",
        "control_residuals": residuals,
        "control_images": "[0, 1], RGB" if residuals else None,
        "lora": None if adapted.lora is None else Path(adapted.lora).name,
        "lora_scale": None if adapted.lora is None else adapted.lora_scale,
        "licence": licence or card_licence(model.path) or "not stated; the licence of the base applies",
        "library": f"sdxs-lightning {_version()}",
    }


def _version() -> str:
    try:
        return version("sdxs-lightning")
    except PackageNotFoundError:  # used from a clone without installation
        return "from a clone"


def residual_inputs(unet: Any) -> list[Residual]:
    """The inputs of a U-Net for residuals: for each skip connection and the middle."""
    found: list[tuple[int, int]] = [(unet.conv_in.out_channels, 0)]
    halvings = 0
    for block in unet.down_blocks:
        channels = block.resnets[-1].out_channels
        found += [(channels, halvings)] * len(block.resnets)
        if block.downsamplers is not None:
            halvings += 1
            found.append((channels, halvings))
    named = [(f"{DOWN_RESIDUAL}{i}", *one) for i, one in enumerate(found)]
    return [*named, (MID_RESIDUAL, *found[-1])]
