"""Images of a student with a ControlNet."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from evaluation.images.control_sets import ControlledPrompts
from evaluation.images.samples import ModelSamples, move_pipeline, with_controlnet
from sdxs_lightning.core.errors import UserError
from sdxs_lightning.core.latents import from_uint8, to_uint8
from sdxs_lightning.core.seeding import Stream, normal
from sdxs_lightning.inference.inputs import torch_dtype
from sdxs_lightning.inference.torch_networks import load_fitting_controlnet


@dataclass(frozen=True)
class ControlledPipeline:
    """Images of a student's pipeline with a ControlNet, by diffusers' own pipelines."""

    pipeline: Any
    """Of class StableDiffusionControlNetPipeline or StableDiffusionXLControlNetPipeline."""
    steps: int
    guidance_scale: float
    seed: int
    """Seed of the noise, which is that of `evaluation.evaluate` without `--control`."""
    timesteps: tuple[int, ...] = ()
    """Timesteps of the sampling steps, descending; () leaves them to the scheduler."""
    conditioning_scale: float = 1.0
    """Factor of the residuals; 0 is the student without control."""

    @classmethod
    def load(cls, samples: ModelSamples, folder: str, device: torch.device) -> ControlledPipeline:
        """Loads the student and the ControlNet.

        Args:
            samples: the student, with its LoRA, scheduler and precision.
            folder: of the ControlNet.
            device: where they run.

        Raises:
            UserError: if one of them is missing, or does not fit the other.
        """
        samples.check()
        plain = samples.pipeline(device)
        try:
            controlnet = load_fitting_controlnet(
                folder, plain.unet, plain.vae_scale_factor, f"--controlnet '{folder}'"
            )
        except (OSError, ValueError) as error:
            raise UserError(str(error)) from error
        pipeline = with_controlnet(plain, controlnet)
        move_pipeline(pipeline, device, torch_dtype(samples.precision))
        pipeline.set_progress_bar_config(disable=True)
        return cls(pipeline, samples.steps, samples.guidance_scale, samples.seed, samples.timesteps)

    def at(self, conditioning_scale: float) -> ControlledPipeline:
        """The same with another conditioning scale."""
        return replace(self, conditioning_scale=conditioning_scale)

    @torch.no_grad()
    def __call__(self, prompts: ControlledPrompts, sample_ids: Tensor) -> Tensor:
        """Images (B,3,H,W) uint8, of the size of the condition images.

        Raises:
            UserError: for a size that the model cannot draw, and for images of NaN or infinity.
        """
        pipeline, factor = self.pipeline, self.pipeline.vae_scale_factor
        controls = prompts.controls_uint8.to(pipeline.device).float() / 255
        height, width = controls.shape[-2:]
        if height % factor or width % factor:
            raise UserError(
                f"the set's images are {height}x{width}, and the model draws multiples of {factor}; give --image_px."
            )
        shape = pipeline.unet.config.in_channels, height // factor, width // factor
        noise = normal(self.seed, Stream.EVALUATION, sample_ids.to(pipeline.device), shape)
        images: Tensor = pipeline(
            prompt=list(prompts.captions),
            image=controls.to(pipeline.unet.dtype),
            latents=noise.to(pipeline.unet.dtype),
            num_inference_steps=self.steps,
            **({"timesteps": list(self.timesteps)} if self.timesteps else {}),
            guidance_scale=self.guidance_scale,
            controlnet_conditioning_scale=self.conditioning_scale,
            generator=[torch.Generator().manual_seed(number) for number in sample_ids.tolist()],
            output_type="pt",
        ).images
        broken = int((~images.isfinite()).flatten(1).any(dim=1).sum())
        if broken:
            raise UserError(
                f"{broken} of {len(images)} images at conditioning scale {self.conditioning_scale:g} have NaN or infinity: the "
                "weights of --controlnet or --model have it, or half precision overflows (--precision fp32)."
            )
        return to_uint8(images.float() * 2 - 1)

    @torch.no_grad()
    def reconstructed(self, prompts: ControlledPrompts, sample_ids: Tensor) -> Tensor:
        """The targets through the pipeline's autoencoder: the ceiling."""
        vae = self.pipeline.vae
        images = from_uint8(prompts.targets_uint8.to(vae.device)).to(vae.dtype)
        encoded = vae.encode(images)
        latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
        return to_uint8(vae.decode(latents).sample.float())
