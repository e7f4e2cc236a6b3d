"""Stable Diffusion XL and derivatives: two text encoders, pooled embeddings, size conditioning; unconditional is zeros."""

from __future__ import annotations

from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from sdxs_lightning.core.batch import Conditioning
from sdxs_lightning.families.folders import Layout, read_json
from sdxs_lightning.families.pretrained import PretrainedBase


class StableDiffusionXL(PretrainedBase):
    """A base such as SDXL.

    Construction reads only small JSON files, after fetching a hub id or converting a single file; networks are loaded on first
    use. Text encoders and VAE are frozen and not in checkpoints.

    Args:
        base: diffusers folder, hub id (`org/name`, `org/name@revision`), or .safetensors file in the original layout.
        conditioning_timestep: timestep of one-step students; 399 is DMD2's "timestep shift" for SDXL.
        config: for a single file, the folder or hub id of its configs and tokenizers.

    Raises:
        FileNotFoundError: if the base or a component is missing.
        ValueError: for a base of another family, a pickle, a corrupt file, or a timestep outside the schedule.
    """

    layout = Layout(
        family="StableDiffusionXL",
        pipeline_class="StableDiffusionXLPipeline",
        components=(
            "unet",
            "vae",
            "text_encoder",
            "text_encoder_2",
            "tokenizer",
            "tokenizer_2",
            "scheduler",
        ),
        single_file={
            "unet": ("model.diffusion_model.",),
            "vae": ("first_stage_model.", "vae."),
            "text_encoder": ("conditioner.embedders.0.transformer.",),
            "text_encoder_2": ("conditioner.embedders.1.model.",),
        },
        pipeline_options={},
    )
    kl_scaling_factor = 0.13025
    encoder_classes: ClassVar = {
        "text_encoder": "CLIPTextModel",
        "text_encoder_2": "CLIPTextModelWithProjection",
    }

    def __init__(self, base: str, conditioning_timestep: int = 399, config: str | None = None) -> None:
        super().__init__(base, conditioning_timestep, config)
        index = read_json(self.folder / "model_index.json")
        self._zeros: bool = index.get("force_zeros_for_empty_prompt", True)

    def encode_prompts(
        self, captions: list[str], original_sizes: Tensor | None = None, crops: Tensor | None = None
    ) -> Conditioning:
        """Embeds captions like the diffusers pipeline: concatenated penultimate hidden states of both encoders, and the
        second one's projected pooled output.

        Args:
            captions: B prompts; may contain "".
            original_sizes: (B, 2) height, width before resizing; None is the target size, as when sampling.
            crops: (B, 2) top, left; None is 0.

        Returns:
            Embeddings and unconditional embeddings in the text encoders' dtype; add_time_ids (B, 6) float32. The
            unconditional ones are zeros, or the encoding of "" if model_index.json disables force_zeros_for_empty_prompt.
        """
        prompt_embeds, pooled = self._embed(captions)
        negative, negative_pooled = torch.zeros_like(prompt_embeds), torch.zeros_like(pooled)
        if not self._zeros:
            empty, empty_pooled = self._empty_prompt
            negative, negative_pooled = empty.expand_as(prompt_embeds), empty_pooled.expand_as(pooled)
        return Conditioning(
            prompt_embeds=prompt_embeds,
            pooled_prompt_embeds=pooled,
            add_time_ids=self._time_ids(len(captions), original_sizes, crops),
            negative_prompt_embeds=negative,
            negative_pooled_prompt_embeds=negative_pooled,
        )

    def _time_ids(self, batch_size: int, original_sizes: Tensor | None, crops: Tensor | None) -> Tensor:
        target = torch.full((batch_size, 2), float(self.resolution), device=self._device)
        original = target if original_sizes is None else original_sizes.to(target)
        corner = torch.zeros_like(target) if crops is None else crops.to(target)
        return torch.cat([original, corner, target], dim=1)

    @torch.no_grad()
    def _embed(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        hidden = []
        for tokenizer, encoder in zip(self._tokenizers, self._text_encoders, strict=True):
            output = encoder(self._token_ids(tokenizer, captions), output_hidden_states=True)
            hidden.append(output.hidden_states[-2])
        pooled: Tensor = output.text_embeds
        return torch.cat(hidden, dim=-1), pooled

    @cached_property
    def _empty_prompt(self) -> tuple[Tensor, Tensor]:
        return self._embed([""])
