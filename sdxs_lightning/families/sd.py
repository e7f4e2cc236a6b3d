"""Stable Diffusion 1.x and 2.x, and bases of their kind: one CLIP text encoder, the encoding of "" as unconditional."""

from __future__ import annotations

from functools import cached_property
from typing import Self

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from sdxs_lightning.batch import Conditioning
from sdxs_lightning.families.folders import check_base, read_json, read_unet, read_vae, vae_factor
from sdxs_lightning.latents import unscale
from sdxs_lightning.noise_schedule import NoiseSchedule, PredictionType
from sdxs_lightning.teacher.frozen import Frozen


class StableDiffusion:
    """A base of the SD-1.5 / SD-2.1 kind in a diffusers folder.

    Construction reads only small JSON files; networks are loaded when they are first asked for. Text encoder and VAE
    are frozen and in no checkpoint.

    Args:
        base: diffusers folder with unet, vae, text_encoder, tokenizer, scheduler.
        conditioning_timestep: the student's constant timestep; 999 is DMD2's for SD. Smaller ones amplify the
            network's error less (x 14.6 at 999 for epsilon, x 2.3 at 399).

    Raises:
        FileNotFoundError: a missing folder or component.
        ValueError: a base of another family, or a timestep that the schedule does not have.
    """

    pipeline_class = "StableDiffusionPipeline"

    def __init__(self, base: str, conditioning_timestep: int = 999) -> None:
        components = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
        self._folder = check_base(base, "StableDiffusion", self.pipeline_class, components)
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
        self.scaling_factor: float = self._vae_config.get("scaling_factor", 0.18215)
        self.resolution: int = self._unet_config["sample_size"] * vae_factor(self._vae_config)
        self._device, self._dtype = torch.device("cpu"), torch.float32

    def latent_shape(self, resolution: int | None = None) -> tuple[int, int, int]:
        """Shape (C, h, w) of one sample's latents, by default at the base's own resolution."""
        side = (resolution or self.resolution) // vae_factor(self._vae_config)
        return self._unet_config["in_channels"], side, side

    def load_unet(self, folder: str | None = None) -> UNet2DConditionModel:
        """A new float32 U-Net: the base's, or that of a U-Net or pipeline folder (a pruned student)."""
        width = read_json(self._folder / "text_encoder" / "config.json")["hidden_size"]
        return read_unet(self._folder, folder, width)

    def load_vae(self) -> AutoencoderKL:
        """The base's VAE, float32."""
        return read_vae(self._folder)

    def encode_prompts(
        self, captions: list[str], original_sizes: Tensor | None = None, crops: Tensor | None = None
    ) -> Conditioning:
        """Embeds captions as the diffusers pipeline does: padded, truncated, last hidden state, no attention mask.

        Args:
            captions: B prompts; "" is an ordinary one.
            original_sizes: ignored, SD is not conditioned on sizes.
            crops: ignored.

        Returns:
            prompt_embeds and negative_prompt_embeds (B, tokens, d) in the text encoder's dtype, without graph.
        """
        prompt_embeds = self._embed(captions)
        negative = self._empty_prompt.to(prompt_embeds).expand_as(prompt_embeds)
        return Conditioning(prompt_embeds=prompt_embeds, negative_prompt_embeds=negative)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) -> images (B, 3, H, W) in [-1, 1] up to the VAE's overshoot, float32."""
        images: Tensor = self._vae.module.decode(
            unscale(latents.to(self._device), self.scaling_factor)
        ).sample
        return images.float()

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Moves what is loaded and what will be. `dtype` is the text encoder's; the VAE stays float32."""
        self._device = torch.device(device) if device is not None else self._device
        self._dtype = dtype or self._dtype
        self.schedule.to(self._device)
        if "_text_encoder" in self.__dict__:
            self._text_encoder.to(self._device, self._dtype)
        if "_vae" in self.__dict__:
            self._vae.to(self._device)
        return self

    @torch.no_grad()
    def _embed(self, captions: list[str]) -> Tensor:
        length = self._tokenizer.model_max_length
        tokens = self._tokenizer(
            captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        embeddings: Tensor = self._text_encoder(tokens.input_ids.to(self._device))[0]
        return embeddings

    @cached_property
    def _empty_prompt(self) -> Tensor:
        return self._embed([""])

    @cached_property
    def _tokenizer(self) -> CLIPTokenizer:
        return CLIPTokenizer.from_pretrained(self._folder / "tokenizer")

    @cached_property
    def _text_encoder(self) -> Frozen[CLIPTextModel]:
        encoder = CLIPTextModel.from_pretrained(self._folder / "text_encoder", dtype=self._dtype)
        return Frozen(encoder).to(self._device)

    @cached_property
    def _vae(self) -> Frozen[AutoencoderKL]:
        return Frozen(self.load_vae()).to(self._device)
