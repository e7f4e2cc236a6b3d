"""Base models behind one interface, so that other packages do not depend on the family."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from sdxs_lightning.core.batch import Conditioning
from sdxs_lightning.core.noise_schedule import NoiseSchedule, PredictionType
from sdxs_lightning.families.network_types import AutoencoderKL, UNet2DConditionModel


@runtime_checkable
class Family(Protocol):
    """A pretrained base: its networks, prompt encoding and constants; implemented by `sd.py` and `sdxl.py`."""

    base: str
    """As given by the user: diffusers folder, hub id, or single .safetensors file. To read files, use `folder`."""
    folder: Path
    """The diffusers folder that the base was resolved to."""
    unet_config: dict[str, Any]
    """Config of the base's U-Net including defaults, read without its weights."""
    conditioning_timestep: int
    """Timestep of one-step students of this base."""
    schedule: NoiseSchedule
    prediction_type: PredictionType
    scaling_factor: float
    """`scaling_factor` of the KL VAE's config."""
    shift_factor: float
    """`shift_factor` of the KL VAE's config; 0 for every SD and SDXL."""
    resolution: int
    """Side in pixels of the base's training images."""
    pipeline_class: str
    """The diffusers pipeline class of exports."""
    pipeline_options: dict[str, Any]
    """Arguments of its `from_pretrained` that omit components not needed by students, such as the safety checker."""

    def latent_shape(self, resolution: int | None = None) -> tuple[int, int, int]:
        """Shape (C, h, w) of one sample's latents."""

    def scale_latents(self, latents: Tensor) -> Tensor:
        """Converts the KL VAE encoder's output, as stored in shards, to U-Net input (B, C, h, w), float32."""

    def unscale_latents(self, latents: Tensor) -> Tensor:
        """The inverse of `scale_latents`: converts to the KL VAE decoder's input."""

    def load_unet(self, folder: str | None = None, option: str = "weights") -> UNet2DConditionModel:
        """Loads a new float32 U-Net: the base's, or that of a folder or hub id (in messages: `option`)."""

    def load_vae(self) -> AutoencoderKL:
        """Loads the base's KL VAE, float32."""

    def encode_prompts(
        self, captions: list[str], original_sizes: Tensor | None = None, crops: Tensor | None = None
    ) -> Conditioning:
        """Embeds B captions, with unconditional embeddings, under no_grad."""

    def tokenizer_digest(self, load: bool) -> str | None:
        """16-digit hex hash of how prompts become token ids; None if the tokenizers are not loaded, unless `load`."""

    def encode(self, images: Tensor) -> Tensor:
        """Encodes images (B, 3, H, W) in [-1, 1] to scaled latents (B, C, h, w), float32: the VAE's means, under no_grad."""

    def decode(self, latents: Tensor) -> Tensor:
        """Decodes scaled latents (B, C, h, w) to images (B, 3, H, W) in [-1, 1], float32, under no_grad."""

    def decode_with_graph(self, latents: Tensor) -> Tensor:
        """Like `decode`, but differentiable, for losses on images."""

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Moves the networks, including those loaded later; `dtype` applies to the text encoders."""
