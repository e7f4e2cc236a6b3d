"""Training pairs of a decoder: latents and target images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sdxs_lightning.core.batch import TrainingBatch
from sdxs_lightning.core.frozen import Frozen
from sdxs_lightning.core.guidance_scale import read_guidance_scale
from sdxs_lightning.core.seeding import Stream, normal
from sdxs_lightning.core.timesteps import Spacing
from sdxs_lightning.families import Family
from sdxs_lightning.networks.denoiser import Denoiser
from sdxs_lightning.networks.network import without_autocast
from sdxs_lightning.pairs.target_sampler import TargetSampler

Target = Literal["vae", "images"]


@dataclass(frozen=True)
class SampledLatents:
    """Settings for sampling latents from the batch's captions with a frozen diffusion model; needs no images."""

    steps: int = 4
    """Number of steps of the ODE sampler."""
    guidance_scale: float = 5.0
    """Guidance scale; 1 means none, as few-step checkpoints expect."""
    spacing: Spacing = "trailing"
    """Timestep spacing of the sampler."""
    weights: str | None = None
    """U-Net or pipeline folder of another checkpoint of the base's architecture, such as a few-step one; null uses the base."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"sampler.steps must be 1 or more, got {self.steps}.")
        scale = read_guidance_scale("sampler.guidance_scale", self.guidance_scale)
        object.__setattr__(self, "guidance_scale", scale)


class DecoderPairs:
    """Provides latents of a batch and their target images; all networks are frozen.

    Args:
        sampler: samples the latents; None uses the batch's, or encodes its images if these are the target.
        target: whether the target images are the VAE's or the batch's.
        seed: seed of the sampler's noise.

    Raises:
        ValueError: if target is "images" with a sampler, since sampled latents have no images.
    """

    def __init__(self, sampler: SampledLatents | None, target: Target, seed: int) -> None:
        if target == "images" and sampler is not None:
            raise ValueError(
                "target images needs the latents of those images: set sampler to null, or target to vae."
            )
        self.target = target
        self.network: Frozen[Denoiser] | None = None
        """The sampler's U-Net, once loaded."""
        self._family: Family
        self._sampling, self._seed = sampler, seed
        self._sampler: TargetSampler | None = None

    def load(self, family: Family, dtype: torch.dtype) -> None:
        """Loads the sampler's U-Net, if any; the stage moves the base and it to the device."""
        self._family = family
        if self._sampling is None:
            return
        unet = family.load_unet(self._sampling.weights, "sampler.weights")
        denoiser = Denoiser(unet, family.schedule, family.prediction_type)
        self.network = Frozen(denoiser).to(dtype=dtype)
        settings = self._sampling.steps, self._sampling.guidance_scale, self._sampling.spacing
        self._sampler = TargetSampler(denoiser, *settings)

    @property
    def vae_factor(self) -> int:
        """Upscaling factor of the VAE per side."""
        return self._family.resolution // self._family.latent_shape()[1]

    @torch.no_grad()
    def latents(self, batch: TrainingBatch) -> Tensor:
        """Scaled latents (B, C, h, w), float32: sampled, from the batch, or encoded from its images."""
        channels = self._family.latent_shape()[0]
        if self._sampler is not None:
            noise = normal(self._seed, Stream.TEACHER_NOISE, batch.positions, self._family.latent_shape())
            return self._sampler(
                noise, self._family.encode_prompts(batch.captions, batch.original_sizes, batch.crops)
            )
        if batch.latents is None and self.target == "images" and batch.images is not None:
            with without_autocast(batch.images.device):
                return self._family.encode(batch.images)
        if batch.latents is None or batch.latents.shape[1] != channels:
            found = "none" if batch.latents is None else f"{batch.latents.shape[1]} channels"
            raise ValueError(
                f"with sampler null the decoder learns on the batch's latents ({channels} channels) and got {found}; make "
                "latent shards for this base and set data.contents to [latents], or set a sampler."
            )
        return self._family.scale_latents(batch.latents)

    def targets(self, batch: TrainingBatch, latents: Tensor) -> Tensor:
        """Target images: (B, 3, H, W), float32, in [-1, 1]."""
        if self.target == "vae":
            return self.decode_by_vae(latents)
        side = latents.shape[-1] * self.vae_factor
        if batch.images is None or batch.images.shape[-1] != side:
            found = "no images" if batch.images is None else f"images {batch.images.shape[-1]} px wide"
            raise ValueError(
                f"with target images the decoder learns from the batch's images ({side} px wide for its latents) and got "
                f"{found}; set data.contents to [images] (or [latents, images] of the same crop), or target to vae."
            )
        return batch.images.float()

    @torch.no_grad()
    def decode_by_vae(self, latents: Tensor) -> Tensor:
        """Decodes with the VAE: (B, 3, H, W), float32, clamped to [-1, 1].

        Autocast is off: bfloat16 would add rounding errors to the target. Clamped, because imitating the VAE's invisible
        overshoot would cost capacity. The decoder's images are not clamped: values out of range would get no gradient.
        """
        with without_autocast(latents.device):
            return self._family.decode(latents).clamp(-1, 1)
