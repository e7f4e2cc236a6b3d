"""Stable Diffusion 1.x, 2.x and derivatives: one CLIP text encoder; unconditional is the encoding of ""."""

from __future__ import annotations

from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from sdxs_lightning.core.batch import Conditioning
from sdxs_lightning.families.folders import Layout
from sdxs_lightning.families.pretrained import PretrainedBase


class StableDiffusion(PretrainedBase):
    """A base such as SD-1.5 or SD-2.1.

    Construction reads only small JSON files, after fetching a hub id or converting a single file; networks are loaded on first
    use. Text encoder and VAE are frozen and not in checkpoints.

    Args:
        base: diffusers folder, hub id (`org/name`, `org/name@revision`), or .safetensors file in the original layout.
        conditioning_timestep: timestep of one-step students; 999 is DMD2's for SD. Smaller ones amplify the network's error
            less (x 14.6 at 999 for epsilon, x 2.3 at 399).
        config: for a single file, the folder or hub id of its configs and tokenizers (SD-1.5, SD-2.1-base and SD-2.1
            differ in them, which cannot be read from the file).

    Raises:
        FileNotFoundError: if the base or a component is missing.
        ValueError: for a base of another family, a pickle, a corrupt file, or a timestep outside the schedule.
    """

    layout = Layout(
        family="StableDiffusion",
        pipeline_class="StableDiffusionPipeline",
        components=("unet", "vae", "text_encoder", "tokenizer", "scheduler"),
        single_file={
            "unet": ("model.diffusion_model.",),
            "vae": ("first_stage_model.", "vae."),
            "text_encoder": ("cond_stage_model.",),
        },
        pipeline_options={
            "safety_checker": None,
            "feature_extractor": None,
            "requires_safety_checker": False,
        },
    )
    kl_scaling_factor = 0.18215
    encoder_classes: ClassVar = {"text_encoder": "CLIPTextModel"}

    def __init__(self, base: str, conditioning_timestep: int = 999, config: str | None = None) -> None:
        super().__init__(base, conditioning_timestep, config)

    def encode_prompts(
        self, captions: list[str], original_sizes: Tensor | None = None, crops: Tensor | None = None
    ) -> Conditioning:
        """Embeds captions like the diffusers pipeline: padded, truncated, last hidden state, no attention mask.

        Args:
            captions: B prompts; may contain "".
            original_sizes: ignored, since SD is not conditioned on sizes.
            crops: ignored.

        Returns:
            prompt_embeds and negative_prompt_embeds (B, tokens, d) in the text encoder's dtype, detached.
        """
        prompt_embeds = self._embed(captions)
        negative = self._empty_prompt.expand_as(prompt_embeds)
        return Conditioning(prompt_embeds=prompt_embeds, negative_prompt_embeds=negative)

    @torch.no_grad()
    def _embed(self, captions: list[str]) -> Tensor:
        ids = self._token_ids(self._tokenizers[0], captions)
        embeddings: Tensor = self._text_encoders[0](ids)[0]
        return embeddings

    @cached_property
    def _empty_prompt(self) -> Tensor:
        return self._embed([""])
