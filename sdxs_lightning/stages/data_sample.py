"""Scaled latents and encoded prompts of a training batch, with caption dropout."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sdxs_lightning.core.batch import Conditioning, TrainingBatch
from sdxs_lightning.core.seeding import Stream, uniform
from sdxs_lightning.families import Family
from sdxs_lightning.objectives.term import LatentSample


def data_sample(
    batch: TrainingBatch, family: Family, seed: int, caption_dropout: float = 0.0
) -> LatentSample:
    """Returns the batch's scaled latents with its captions encoded; SDXL also gets image sizes and crops.

    Args:
        batch: must have latents.
        family: scales the latents and encodes the captions.
        seed: seed of the run; with the positions it determines which captions are dropped.
        caption_dropout: probability of replacing a caption by the unconditional prompt.

    Raises:
        ValueError: if the batch has no latents, or not with this base's number of channels.
    """
    channels = family.latent_shape()[0]
    if batch.latents is None or batch.latents.shape[1] != channels:
        found = "none" if batch.latents is None else f"some of shape {tuple(batch.latents.shape[1:])}"
        raise ValueError(
            f"this stage trains on latents with {channels} channels and got {found}; point data.shards at latent shards "
            "made with this base's VAE, and let data.contents name latents."
        )
    conditioning = family.encode_prompts(batch.captions, batch.original_sizes, batch.crops)
    if caption_dropout > 0:
        dropped = uniform(seed, Stream.DROPOUT, batch.positions) < caption_dropout
        conditioning = without_prompts(conditioning, dropped)
    latents = family.scale_latents(batch.latents)
    return LatentSample(latents=latents, conditioning=conditioning, positions=batch.positions, seed=seed)


def without_prompts(conditioning: Conditioning, dropped: Tensor) -> Conditioning:
    """Replaces prompts by the unconditional ones that guidance uses: "" in SD, zeros in SDXL.

    Args:
        conditioning: of B prompts, with the unconditional embeddings.
        dropped: (B,), bool, True where the prompt is replaced.
    """
    uncond = conditioning.unconditional()
    pooled = conditioning.pooled_prompt_embeds
    if pooled is not None:
        assert uncond.pooled_prompt_embeds is not None
        pooled = torch.where(dropped[:, None], uncond.pooled_prompt_embeds, pooled)
    prompt_embeds = torch.where(dropped[:, None, None], uncond.prompt_embeds, conditioning.prompt_embeds)
    return replace(conditioning, prompt_embeds=prompt_embeds, pooled_prompt_embeds=pooled)
