"""The networks of a student as functions of named tensors: what goes into an export, part by part.

Names and outputs are those of optimum's exports, so that its pipelines, and programs written for them, find what they look
for. Where those scale latents outside of the networks, the scaling is inside here and the written config says 1: nobody has to
know a tiny decoder's from a KL decoder's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdxs_lightning.core.errors import UserError
from sdxs_lightning.inference.adapters import ScaledAdapter
from sdxs_lightning.inference.graph_networks import DOWN_RESIDUAL, MID_RESIDUAL
from sdxs_lightning.inference.model_folder import ModelFolder
from sdxs_lightning.inference.torch_networks import (
    encoder_folder,
    load_fitting_controlnet,
    load_part,
)

_BATCH, _LATENT_SIDES = 2, (9, 11)
"""Sides of the traced latents: no multiple of a downsampling factor, so that the U-Net upsamples to the size of its skip
connections, which is right for every size; at multiples the graph would hold "twice as large"."""


@dataclass(frozen=True)
class Part:
    """A network to export."""

    name: str
    """Folder of the export."""
    module: nn.Module
    """Takes the inputs in their order, returns a tuple of the outputs."""
    inputs: Mapping[str, Tensor]
    """Example inputs."""
    outputs: Sequence[str]
    axes: Mapping[str, Mapping[int, str]]
    """Dynamic axes of inputs and outputs."""
    config: Mapping[str, Any]
    """config.json of the folder."""


@dataclass(frozen=True)
class Adapted:
    """What is exported with a student."""

    controlnet: str | Path | None = None
    """Folder of a ControlNet; the U-Net gets inputs for its residuals."""
    lora: str | Path | None = None
    """LoRA that is merged into the U-Net."""
    lora_scale: float = 1.0


def parts(model: ModelFolder, adapted: Adapted, dtype: torch.dtype) -> Iterator[Part]:
    """The networks of a student one after the other, so that only one is in memory.

    Args:
        model: a diffusers folder.
        adapted: ControlNet and LoRA.
        dtype: float32 or float16, of weights, inputs and outputs.

    Raises:
        FileNotFoundError: for missing weights.
        ValueError: for unreadable weights, or a ControlNet that does not fit.
        UserError: for a LoRA that does not fit.
    """
    for name in model.encoders:
        yield _text_encoder(model, name, dtype)
    unet = load_part(model, "unet")
    if adapted.controlnet is not None:
        named = f"controlnet '{adapted.controlnet}'"
        yield _controlnet(
            model, load_fitting_controlnet(adapted.controlnet, unet, model.factor, named), dtype
        )
    if adapted.lora is not None:
        ScaledAdapter.load(adapted.lora, unet, adapted.lora_scale).start()
    yield _unet(model, unet, adapted.controlnet is not None, dtype)
    del unet
    vae = load_part(model, "vae")
    yield _decoder(model, vae, dtype)
    try:
        source = encoder_folder(model, vae)
    except UserError:  # a student without encoder makes images from noise only
        return
    if source != "vae":
        vae = load_part(model, source)
    yield _encoder(model, vae, source, dtype)


class _TextEncoder(nn.Module):
    """Embeddings of token ids; `hidden` also returns the input of each layer and the last one's output."""

    def __init__(self, encoder: nn.Module, hidden: bool) -> None:
        super().__init__()
        self.encoder, self.hidden = encoder, hidden

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        output = self.encoder(input_ids, output_hidden_states=self.hidden)
        pooled = output.text_embeds if hasattr(output, "text_embeds") else output.pooler_output
        first = (pooled, output.last_hidden_state) if hasattr(output, "text_embeds") else (output[0], pooled)
        return (*first, *(output.hidden_states if self.hidden else ()))


class _Unet(nn.Module):
    """The U-Net of inputs in a row: sample, timestep, prompts, [pooled, time ids], [residuals, the middle one last]."""

    def __init__(self, unet: nn.Module, pooled: bool) -> None:
        super().__init__()
        self.unet, self.pooled = unet, pooled

    def forward(self, sample: Tensor, timestep: Tensor, prompts: Tensor, *rest: Tensor) -> tuple[Tensor]:
        added = {"text_embeds": rest[0], "time_ids": rest[1]} if self.pooled else None
        residuals = rest[2:] if self.pooled else rest
        given: dict[str, Any] = {}
        if residuals:
            given = {
                "down_block_additional_residuals": residuals[:-1],
                "mid_block_additional_residual": residuals[-1],
            }
        output = self.unet(
            sample,
            timestep,
            encoder_hidden_states=prompts,
            added_cond_kwargs=added,
            return_dict=False,
            **given,
        )
        return (output[0],)


class _ControlNet(nn.Module):
    """The ControlNet of inputs in a row; the residuals in theirs."""

    def __init__(self, controlnet: nn.Module, pooled: bool) -> None:
        super().__init__()
        self.controlnet, self.pooled = controlnet, pooled

    def forward(
        self, sample: Tensor, timestep: Tensor, prompts: Tensor, images: Tensor, scale: Tensor, *rest: Tensor
    ) -> tuple[Tensor, ...]:
        added = {"text_embeds": rest[0], "time_ids": rest[1]} if self.pooled else None
        down, mid = self.controlnet(
            sample,
            timestep,
            encoder_hidden_states=prompts,
            controlnet_cond=images,
            conditioning_scale=scale,
            added_cond_kwargs=added,
            return_dict=False,
        )
        return (*down, mid)


class _Decoder(nn.Module):
    """Scaled latents to images; in float32 inside, where half precision overflows."""

    def __init__(self, vae: Any, scale: float, float32: bool) -> None:
        super().__init__()
        self.vae: Any = vae
        self.scale, self.float32 = scale, float32

    def forward(self, latent_sample: Tensor) -> tuple[Tensor]:
        latents = latent_sample.float() if self.float32 else latent_sample
        images = self.vae.decode(latents / self.scale, return_dict=False)[0]
        return (images.to(latent_sample.dtype),)


class _Encoder(nn.Module):
    """Images to scaled latents (tiny), or to their means and log variances (KL), scaled likewise."""

    def __init__(self, vae: Any, scale: float, float32: bool) -> None:
        super().__init__()
        self.vae: Any = vae
        self.scale, self.float32 = scale, float32

    def forward(self, sample: Tensor) -> tuple[Tensor]:
        encoded = self.vae.encode(sample.float() if self.float32 else sample)
        if hasattr(encoded, "latents"):
            return ((encoded.latents * self.scale).to(sample.dtype),)
        mean, logvar = encoded.latent_dist.mean, encoded.latent_dist.logvar
        scaled = torch.cat([mean * self.scale, logvar + 2 * math.log(self.scale)], dim=1)
        return (scaled.to(sample.dtype),)


def _cast(network: nn.Module, dtype: torch.dtype) -> None:
    nn.Module.to(network, dtype=dtype)  # the override of diffusers warns about every cast


def _text_encoder(model: ModelFolder, name: str, dtype: torch.dtype) -> Part:
    encoder: Any = load_part(model, name).to(dtype)
    hidden = model.has_pooled_prompts
    settings = encoder.config
    projected = type(encoder).__name__ == "CLIPTextModelWithProjection"
    outputs = ["text_embeds", "last_hidden_state"] if projected else ["last_hidden_state", "pooler_output"]
    if hidden:
        outputs += [f"hidden_states.{i}" for i in range(settings.num_hidden_layers + 1)]
    ids = torch.zeros(_BATCH, settings.max_position_embeddings, dtype=torch.int64)
    axes = {one: {0: "batch"} for one in ("input_ids", *outputs)}
    # Causal masks by a fused kernel are built from the batch at hand; the explicit ones trace.
    encoder.set_attn_implementation("eager")
    config = settings.to_dict() | {"dtype": str(dtype).removeprefix("torch.")}
    return Part(name, _TextEncoder(encoder, hidden), {"input_ids": ids}, outputs, axes, config)


def _noisy(model: ModelFolder, dtype: torch.dtype, width: int) -> dict[str, Tensor]:
    """The inputs that U-Net and ControlNet share, but for SDXL's."""
    return {
        "sample": torch.zeros(_BATCH, model.latent_channels, *_LATENT_SIDES, dtype=dtype),
        "timestep": torch.tensor(model.plan.steps[0].timestep),
        "encoder_hidden_states": torch.zeros(_BATCH, 7, width, dtype=dtype),
    }


def _added(unet: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """SDXL's inputs: pooled prompts and size conditioning."""
    settings = unet.config
    if settings.addition_embed_type is None:
        return {}
    pooled = settings.projection_class_embeddings_input_dim - 6 * settings.addition_time_embed_dim
    return {
        "text_embeds": torch.zeros(_BATCH, pooled, dtype=dtype),
        "time_ids": torch.zeros(_BATCH, 6, dtype=dtype),
    }


def _axes(inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> dict[str, dict[int, str]]:
    """Batch and sides are dynamic, and the number of tokens; sides have a name for each resolution."""
    axes: dict[str, dict[int, str]] = {}
    for name, tensor in inputs.items():
        if tensor.ndim == 4:
            axes[name] = {0: "batch", 2: f"{name}_height", 3: f"{name}_width"}
        elif tensor.ndim in (2, 3):
            axes[name] = {0: "batch"} | ({1: "tokens"} if tensor.ndim == 3 else {})
    for name in outputs:
        axes[name] = {0: "batch", 2: f"{name}_height", 3: f"{name}_width"}
    return axes


def _prompt_width(unet: Any) -> int:
    width = unet.config.cross_attention_dim
    return int(width[0] if isinstance(width, list | tuple) else width)


def _unet(model: ModelFolder, unet: Any, controlled: bool, dtype: torch.dtype) -> Part:
    _cast(unet, dtype)
    added = _added(unet, dtype)
    inputs = _noisy(model, dtype, _prompt_width(unet)) | added
    if controlled:
        inputs |= _residuals(unet, dtype)
    module = _Unet(unet, bool(added))
    return Part("unet", module, inputs, ["out_sample"], _axes(inputs, ["out_sample"]), dict(unet.config))


def _residuals(unet: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """Zeros in the shapes of a ControlNet's residuals."""
    height, width = _LATENT_SIDES
    shapes = [(unet.conv_in.out_channels, height, width)]
    for block in unet.down_blocks:
        channels = block.resnets[-1].out_channels
        shapes += [(channels, height, width)] * len(block.resnets)
        if block.downsamplers is not None:
            height, width = (height + 1) // 2, (width + 1) // 2
            shapes.append((channels, height, width))
    zeros = [torch.zeros(_BATCH, *shape, dtype=dtype) for shape in (*shapes, shapes[-1])]
    names = [f"{DOWN_RESIDUAL}{i}" for i in range(len(shapes))]
    return dict(zip([*names, MID_RESIDUAL], zeros, strict=True))


def _controlnet(model: ModelFolder, controlnet: Any, dtype: torch.dtype) -> Part:
    _cast(controlnet, dtype)
    factor = model.factor
    images = torch.zeros(_BATCH, 3, *(side * factor for side in _LATENT_SIDES), dtype=dtype)
    added = _added(controlnet, dtype)
    inputs = _noisy(model, dtype, _prompt_width(controlnet))
    inputs |= {"controlnet_cond": images, "conditioning_scale": torch.tensor(1.0, dtype=dtype)} | added
    count = len(controlnet.controlnet_down_blocks)
    outputs = [*(f"down_block_res_sample_{i}" for i in range(count)), "mid_block_res_sample"]
    module = _ControlNet(controlnet, bool(added))
    return Part("controlnet", module, inputs, outputs, _axes(inputs, outputs), dict(controlnet.config))


def _decoder(model: ModelFolder, vae: Any, dtype: torch.dtype) -> Part:
    float32 = bool(vae.config.get("force_upcast", False))
    _cast(vae, torch.float32 if float32 else dtype)
    inputs = {"latent_sample": torch.zeros(_BATCH, model.latent_channels, *_LATENT_SIDES, dtype=dtype)}
    module = _Decoder(vae, model.scale_of("vae"), float32)
    axes = _axes(inputs, ["sample"])
    return Part("vae_decoder", module, inputs, ["sample"], axes, _scaled_config(vae))


def _encoder(model: ModelFolder, vae: Any, source: str, dtype: torch.dtype) -> Part:
    float32 = bool(vae.config.get("force_upcast", False))
    _cast(vae, torch.float32 if float32 else dtype)
    sides = [side * model.factor for side in (8, 8)]
    inputs = {"sample": torch.zeros(_BATCH, 3, *sides, dtype=dtype)}
    tiny = type(vae).__name__ == "AutoencoderTiny"
    outputs = ["latent_sample" if tiny else "latent_parameters"]
    module = _Encoder(vae, model.scale_of(source), float32)
    axes = _axes(inputs, outputs)
    return Part("vae_encoder", module, inputs, outputs, axes, _scaled_config(vae))


def _scaled_config(vae: Any) -> dict[str, Any]:
    """The autoencoder's config for callers that scale latents themselves."""
    return dict(vae.config) | {"scaling_factor": 1.0, "shift_factor": None, "force_upcast": False}
