"""Exported students of tiny size, as a user has them: SD and SDXL, without mid block, with a tiny decoder, of several steps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from sdxs_lightning.core.noise_schedule import PredictionType
from sdxs_lightning.export import export_pipeline
from sdxs_lightning.families.detect import detect_family
from sdxs_lightning.networks.controlnet import controlnet_from_unet, load_controlnet, save_controlnet
from sdxs_lightning.networks.lora_files import LowRank, write_lora
from tests.helpers.tiny import save_tiny_sd, save_tiny_sdxl, tiny_sd_unet, tiny_sdxl_unet
from tests.helpers.tiny_releases import tiny_decoder, unet_like

PROMPTS = ["a red circle", "a blue star on a white background"]
SEEDS = [3, 8]
KINDS = {
    "sd": {},
    "sdxl": {"sdxl": True},
    "sd-midless": {"mid": None, "prediction_type": "v_prediction", "tiny": True},
    "sdxl-midless": {"sdxl": True, "mid": None, "tiny": True},
    "sd-4-steps": {"timesteps": (999, 749, 499, 249)},
    "sdxl-4-steps": {"sdxl": True, "timesteps": (399, 299, 199, 99), "prediction_type": "v_prediction"},
}
"""Arguments of `save_student` by name."""


def save_student(
    root: Path,
    name: str,
    sdxl: bool = False,
    mid: str | None = "UNetMidBlock2DCrossAttn",
    prediction_type: PredictionType = "epsilon",
    tiny: bool = False,
    timesteps: tuple[int, ...] | None = None,
    stages: int = 3,
) -> Path:
    """Writes a student in float32, its ControlNet (NAME-controlnet) and its LoRA (NAME-lora).

    Args:
        root: folder of them.
        name: of the student's folder.
        sdxl: SDXL kind rather than SD.
        mid: mid block of the U-Net.
        prediction_type: of the base.
        tiny: decode with a tiny autoencoder, whose encoder is trained too.
        timesteps: of a student of several steps.
        stages: of the U-Net, 3 or 2.
    """
    base = root / f"{name}-base"
    (save_tiny_sdxl if sdxl else save_tiny_sd)(base, prediction_type, stages=stages)
    like = tiny_sdxl_unet(stages=stages) if sdxl else tiny_sd_unet(stages=stages)
    unet = unet_like(like, mid_block_type=mid)
    vae = None
    if tiny:
        vae = str(root / f"{name}-vae")
        decoder = tiny_decoder()
        torch.nn.init.constant_(decoder.decoder.layers[-1].bias, 0.5)  # not black
        torch.nn.init.normal_(
            decoder.decoder.layers[-1].weight, std=0.5, generator=torch.Generator().manual_seed(3)
        )
        decoder.save_pretrained(vae)
    export_pipeline(
        unet, detect_family(str(base)), root / name, dtype=torch.float32, vae=vae, timesteps=timesteps
    )
    save_controlnet(random_controlnet(unet), root / f"{name}-controlnet", torch.float32)
    (root / f"{name}-lora").mkdir()
    write_lora(root / f"{name}-lora", random_lora(unet), dtype=torch.float32)
    shutil.rmtree(base)
    return root / name


def random_controlnet(unet: Any) -> Any:
    """A ControlNet whose residuals are not 0, and depend on the condition."""
    controlnet = controlnet_from_unet(unet, stem_widths=(8, 8))
    noise = torch.Generator().manual_seed(1)
    zero = (controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block)
    with torch.no_grad():
        for module in (*zero, controlnet.controlnet_cond_embedding.conv_out):
            for one in module.parameters():
                one.normal_(0, 0.1 if one.shape[-1] == 1 or one.ndim == 1 else 1.0, generator=noise)
    return controlnet


def random_lora(unet: Any) -> dict[str, LowRank]:
    """Rank 2 on attention, projections and convolutions."""
    noise = torch.Generator().manual_seed(2)
    found = {}
    for name, module in unet.named_modules():
        if name.endswith(("to_q", "to_v", "proj_in", "conv1")):
            shape = module.weight.shape
            down = 0.3 * torch.randn(2, *shape[1:], generator=noise)
            up = 0.3 * torch.randn(shape[0], 2, *([1, 1] if len(shape) == 4 else []), generator=noise)
            found[name] = LowRank(down, up, 2.0)
    return found


def condition(count: int, size: tuple[int, int], seed: int = 0) -> Tensor:
    """Random images (B, 3, H, W), uint8."""
    noise = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, *size), generator=noise, dtype=torch.uint8)


def stock_images(
    student: Path,
    size: tuple[int, int] = (32, 32),
    dtype: torch.dtype = torch.float32,
    control_images: Tensor | None = None,
    control_scale: float = 1.0,
    lora_scale: float | None = None,
    image: Tensor | None = None,
    strength: float | None = None,
) -> Tensor:
    """(2, 3, H, W) in [0, 1], by diffusers' own pipelines."""
    index = json.loads((student / "model_index.json").read_text())
    kind = index["_class_name"]
    pipeline = getattr(diffusers, kind).from_pretrained(student, torch_dtype=dtype)
    if lora_scale is not None:
        pipeline.load_lora_weights(student.with_name(f"{student.name}-lora"), adapter_name="style")
        pipeline.set_adapters("style", lora_scale)
    scheduler = json.loads((student / "scheduler" / "scheduler_config.json").read_text())
    steps = scheduler.get("original_inference_steps", 1) if "LCM" in scheduler["_class_name"] else 1
    given: dict[str, Any] = {"num_inference_steps": steps, "height": size[0], "width": size[1]}
    parts = dict(pipeline.components)
    if control_images is not None:
        controlnet = load_controlnet(student.with_name(f"{student.name}-controlnet")).to(dtype)
        pipeline = getattr(diffusers, kind.replace("Pipeline", "ControlNetPipeline"))(
            **parts, controlnet=controlnet
        )
        given |= {"image": control_images.float() / 255, "controlnet_conditioning_scale": control_scale}
    elif image is not None:
        assert strength is not None
        pipeline = getattr(diffusers, kind.replace("Pipeline", "Img2ImgPipeline"))(**parts)
        # A one-step student takes its step at the timestep of N = 1 / strength steps.
        given = {"num_inference_steps": steps if steps > 1 else round(1 / strength), "strength": strength}
        given["image"] = image.float() / 255
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    images: Tensor = pipeline(
        PROMPTS, guidance_scale=0.0, generator=generators, output_type="pt", **given
    ).images
    return images.float()
