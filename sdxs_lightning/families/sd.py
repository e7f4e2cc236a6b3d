"""Stable Diffusion 1.x and 2.x and models like them: one CLIP text encoder, the encoding of "" as unconditional."""

from __future__ import annotations

from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor
from transformers import CLIPTextModel

from sdxs_lightning.core.batch import Conditioning
from sdxs_lightning.families.folders import Layout
from sdxs_lightning.families.pretrained import PretrainedBase


class StableDiffusion(PretrainedBase):
    """A base like SD-1.5 or SD-2.1.

    Construction reads only small JSON files, once a hub id has been fetched or a single file converted; networks are
    loaded on first use. Text encoder and VAE are frozen and in no checkpoint.

    Args:
        base: diffusers folder, hub id (`org/name`, `org/name@revision`), or .safetensors file in the original layout.
        conditioning_timestep: the student's constant timestep; 999 is DMD2's for SD. Smaller ones amplify the
            network's error less (x 14.6 at 999 for epsilon, x 2.3 at 399).
        config: for a single file, the folder or hub id of its configs and tokenizers (SD-1.5, SD-2.1-base and SD-2.1
            differ in them, which cannot be read from the file).

    Raises:
        FileNotFoundError: nothing there, or a component is missing.
        ValueError: a base of another family, a pickle, a broken file, or a timestep that the schedule does not have.
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
    encoder_classes: ClassVar = {"text_encoder": CLIPTextModel}

    def __init__(self, base: str, conditioning_timestep: int = 999, config: str | None = None) -> None:
        super().__init__(base, conditioning_timestep, config)

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
