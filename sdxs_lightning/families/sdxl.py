"""Stable Diffusion XL and bases of its kind: two text encoders, pooled embeddings, size conditioning, zeros as
unconditional.
"""

from __future__ import annotations

from functools import cached_property
from typing import Self

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from sdxs_lightning.batch import Conditioning
from sdxs_lightning.families.folders import check_base, read_json, read_unet, read_vae, vae_factor
from sdxs_lightning.latents import unscale
from sdxs_lightning.noise_schedule import NoiseSchedule, PredictionType
from sdxs_lightning.teacher.frozen import Frozen


class StableDiffusionXL:
    """A base of the SDXL kind in a diffusers folder.

    Construction reads only small JSON files; networks are loaded when they are first asked for. Text encoders and VAE
    are frozen and in no checkpoint.

    Args:
        base: diffusers folder with unet, vae, two text encoders, two tokenizers, scheduler.
        conditioning_timestep: the student's constant timestep; 399 is DMD2's "timestep shift" for SDXL.

    Raises:
        FileNotFoundError: a missing folder or component.
        ValueError: a base of another family, or a timestep that the schedule does not have.
    """

    pipeline_class = "StableDiffusionXLPipeline"

    def __init__(self, base: str, conditioning_timestep: int = 399) -> None:
        components = (
            "unet",
            "vae",
            "text_encoder",
            "text_encoder_2",
            "tokenizer",
            "tokenizer_2",
            "scheduler",
        )
        self._folder = check_base(base, "StableDiffusionXL", self.pipeline_class, components)
        self.base = base
        scheduler = read_json(self._folder / "scheduler" / "scheduler_config.json")
        self.schedule = NoiseSchedule.from_scheduler_config(scheduler)
        self.prediction_type: PredictionType = scheduler.get("prediction_type", "epsilon")
        if not 0 <= conditioning_timestep < self.schedule.num_train_timesteps:
            raise ValueError(
                f"conditioning_timestep must be in [0, {self.schedule.num_train_timesteps - 1}], got "
                f"{conditioning_timestep}; change family.init_args.conditioning_timestep."
            )
        self.conditioning_timestep = conditioning_timestep
        self._unet_config = read_json(self._folder / "unet" / "config.json")
        self._vae_config = read_json(self._folder / "vae" / "config.json")
        self.scaling_factor: float = self._vae_config.get("scaling_factor", 0.13025)
        self.resolution: int = self._unet_config["sample_size"] * vae_factor(self._vae_config)
        self._device, self._dtype = torch.device("cpu"), torch.float32

    def latent_shape(self, resolution: int | None = None) -> tuple[int, int, int]:
        """Shape (C, h, w) of one sample's latents, by default at the base's own resolution."""
        side = (resolution or self.resolution) // vae_factor(self._vae_config)
        return self._unet_config["in_channels"], side, side

    def load_unet(self, folder: str | None = None) -> UNet2DConditionModel:
        """A new float32 U-Net: the base's, or that of a U-Net or pipeline folder (a pruned student)."""
        widths = [
            read_json(self._folder / name / "config.json")["hidden_size"] for name in self._encoder_names
        ]
        return read_unet(self._folder, folder, sum(widths))

    def load_vae(self) -> AutoencoderKL:
        """The base's VAE, float32."""
        return read_vae(self._folder)

    def encode_prompts(
        self, captions: list[str], original_sizes: Tensor | None = None, crops: Tensor | None = None
    ) -> Conditioning:
        """Embeds captions as the diffusers pipeline does: penultimate hidden states of both encoders side by side, and
        the second one's projected pooled output.

        Args:
            captions: B prompts; "" is an ordinary one.
            original_sizes: (B, 2) height, width before resizing; None says the target size, as when sampling.
            crops: (B, 2) top, left; None says 0.

        Returns:
            embeddings and zeros as their unconditional twin, in the text encoders' dtype; add_time_ids (B, 6) float32.
        """
        prompt_embeds, pooled = self._embed(captions)
        return Conditioning(
            prompt_embeds=prompt_embeds,
            pooled_prompt_embeds=pooled,
            add_time_ids=self._time_ids(len(captions), original_sizes, crops),
            negative_prompt_embeds=torch.zeros_like(prompt_embeds),
            negative_pooled_prompt_embeds=torch.zeros_like(pooled),
        )

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) -> images (B, 3, H, W) in [-1, 1] up to the VAE's overshoot, float32."""
        images: Tensor = self._vae.module.decode(
            unscale(latents.to(self._device), self.scaling_factor)
        ).sample
        return images.float()

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Moves what is loaded and what will be. `dtype` is the text encoders'; the VAE stays float32, because SDXL's
        overflows in float16.
        """
        self._device = torch.device(device) if device is not None else self._device
        self._dtype = dtype or self._dtype
        self.schedule.to(self._device)
        if "_text_encoders" in self.__dict__:
            for encoder in self._text_encoders:
                encoder.to(self._device, self._dtype)
        if "_vae" in self.__dict__:
            self._vae.to(self._device)
        return self

    _encoder_names = ("text_encoder", "text_encoder_2")

    def _time_ids(self, batch_size: int, original_sizes: Tensor | None, crops: Tensor | None) -> Tensor:
        target = torch.full((batch_size, 2), float(self.resolution), device=self._device)
        original = target if original_sizes is None else original_sizes.to(target)
        corner = torch.zeros_like(target) if crops is None else crops.to(target)
        return torch.cat([original, corner, target], dim=1)

    @torch.no_grad()
    def _embed(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        hidden = []
        for tokenizer, encoder in zip(self._tokenizers, self._text_encoders, strict=True):
            length = tokenizer.model_max_length
            tokens = tokenizer(
                captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
            )
            output = encoder(tokens.input_ids.to(self._device), output_hidden_states=True)
            hidden.append(output.hidden_states[-2])
        pooled: Tensor = output.text_embeds
        return torch.cat(hidden, dim=-1), pooled

    @cached_property
    def _tokenizers(self) -> tuple[CLIPTokenizer, CLIPTokenizer]:
        first, second = (
            CLIPTokenizer.from_pretrained(self._folder / name) for name in ("tokenizer", "tokenizer_2")
        )
        return first, second

    @cached_property
    def _text_encoders(self) -> tuple[Frozen[CLIPTextModel], Frozen[CLIPTextModelWithProjection]]:
        first, second = (self._folder / name for name in self._encoder_names)
        return (
            Frozen(CLIPTextModel.from_pretrained(first, dtype=self._dtype)).to(self._device),
            Frozen(CLIPTextModelWithProjection.from_pretrained(second, dtype=self._dtype)).to(self._device),
        )

    @cached_property
    def _vae(self) -> Frozen[AutoencoderKL]:
        return Frozen(self.load_vae()).to(self._device)
