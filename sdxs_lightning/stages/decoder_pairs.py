"""Training pairs of a decoder: latents, and the images they should decode to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sdxs_lightning.core.batch import TrainingBatch
from sdxs_lightning.core.frozen import Frozen
from sdxs_lightning.core.seeding import Stream, normal
from sdxs_lightning.core.timesteps import Spacing
from sdxs_lightning.families import Family
from sdxs_lightning.networks.denoiser import Denoiser
from sdxs_lightning.networks.network import without_autocast
from sdxs_lightning.pairs.target_sampler import TargetSampler

Target = Literal["vae", "images"]


@dataclass(frozen=True)
class SampledLatents:
    """Latents that a frozen diffusion model makes from the batch's captions: no images are needed."""

    steps: int = 4
    """Steps of the ODE sampler."""
    guidance_scale: float = 5.0
    """Guidance; 1 means none, as few-step checkpoints want it."""
    spacing: Spacing = "trailing"
    """Timesteps of the sampler."""
    weights: str | None = None
    """U-Net or pipeline folder of another checkpoint of the base's kind, for example a few-step one; null is the base's."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"sampler.steps must be 1 or more, got {self.steps}.")


class DecoderPairs:
    """Latents of a batch and their images; the networks that make them are frozen.

    Args:
        sampler: makes the latents; None takes the batch's, or encodes its images where they are the target.
        target: who made the images: the VAE, or the data.
        seed: of the sampler's noise.

    Raises:
        ValueError: for sampled latents whose images the data would have to hold.
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
        """Takes the base, and loads the sampler's U-Net if there is a sampler; the stage moves both."""
        self._family = family
        if self._sampling is None:
            return
        unet = family.load_unet(self._sampling.weights)
        denoiser = Denoiser(unet, family.schedule, family.prediction_type)
        self.network = Frozen(denoiser).to(dtype=dtype)
        settings = self._sampling.steps, self._sampling.guidance_scale, self._sampling.spacing
        self._sampler = TargetSampler(denoiser, *settings)

    @property
    def vae_factor(self) -> int:
        """Pixels per latent, a side."""
        return self._family.resolution // self._family.latent_shape()[1]

    @torch.no_grad()
    def latents(self, batch: TrainingBatch) -> Tensor:
        """Scaled latents (B, C, h, w), float32: sampled, or the batch's."""
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
        """What the decoder's images are compared with: (B, 3, H, W), float32, in [-1, 1]."""
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
        """The VAE's images (B, 3, H, W), float32, as they are seen: in [-1, 1].

        Outside autocast: bfloat16 would put an error of its own into the target. Clamped: the VAE overshoots, and nobody sees
        by how much, and imitating that would take capacity. The decoder's images are not clamped, since a value beyond the
        range would then have no gradient that leads it back.
        """
        with without_autocast(latents.device):
            return self._family.decode(latents).clamp(-1, 1)
