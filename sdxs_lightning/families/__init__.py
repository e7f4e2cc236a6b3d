"""Base models behind one interface, so that no other file asks which family a base is of."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, Self, runtime_checkable

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor

from sdxs_lightning.core.batch import Conditioning
from sdxs_lightning.core.noise_schedule import NoiseSchedule, PredictionType


@runtime_checkable
class Family(Protocol):
    """A pretrained base: its networks, its prompt encoding, and its constants. `sd.py` and `sdxl.py` implement it."""

    base: str
    """As the user gave it: diffusers folder, hub id, or single .safetensors file. To read files, use `folder`."""
    folder: Path
    """The diffusers folder that the base was resolved to."""
    unet_config: dict[str, Any]
    """Settings of the base's U-Net, defaults included; known without reading its weights."""
    conditioning_timestep: int
    """The constant timestep of one-step students of this base."""
    schedule: NoiseSchedule
    prediction_type: PredictionType
    scaling_factor: float
    """`scaling_factor` of the KL VAE's config."""
    shift_factor: float
    """`shift_factor` of the KL VAE's config; 0 for every SD and SDXL."""
    resolution: int
    """Side in pixels of the images that the base was trained on."""
    pipeline_class: str
    """The diffusers pipeline that an export names."""
    pipeline_options: dict[str, Any]
    """Arguments of its `from_pretrained` that leave out components which no student needs, such as a safety checker."""

    def latent_shape(self, resolution: int | None = None) -> tuple[int, int, int]:
        """Shape (C, h, w) of one sample's latents."""

    def scale_latents(self, latents: Tensor) -> Tensor:
        """What the KL VAE's encoder returns, and shards store -> what the U-Net reads: (B, C, h, w), float32."""

    def unscale_latents(self, latents: Tensor) -> Tensor:
        """The inverse of `scale_latents`: what the KL VAE's decoder takes."""

    def load_unet(self, folder: str | None = None) -> UNet2DConditionModel:
        """A new float32 U-Net: the base's, or that of a U-Net or pipeline folder or hub id."""

    def load_vae(self) -> AutoencoderKL:
        """The base's KL VAE, float32."""

    def encode_prompts(
        self, captions: list[str], original_sizes: Tensor | None = None, crops: Tensor | None = None
    ) -> Conditioning:
        """Embeds B captions, with their unconditional twin, without graph."""

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> scaled latents (B, C, h, w), float32: the VAE's means, without graph."""

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) -> images (B, 3, H, W) in [-1, 1], float32, without graph."""

    def decode_with_graph(self, latents: Tensor) -> Tensor:
        """`decode` with a graph to the latents, for losses on images."""

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Moves the networks, also those loaded later; dtype is that of the text encoders."""
