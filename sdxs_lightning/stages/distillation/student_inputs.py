"""What the student gets for a micro-batch: noise or images to begin from, conditioning, and the pairs' targets."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from sdxs_lightning.core.batch import Conditioning, TrainingBatch
from sdxs_lightning.families import Family
from sdxs_lightning.networks.backward_simulation import ImageStarts, draw_image_starts
from sdxs_lightning.networks.guidance_input import GuidanceInput
from sdxs_lightning.networks.student_generator import StudentGenerator


class StudentInputs(NamedTuple):
    """What the student gets for a micro-batch."""

    noise: Tensor
    """(B, C, h, w), float32, N(0, 1)."""
    conditioning: Conditioning
    """Conditioning of B prompts."""
    target: Tensor | None
    """(B, C, h, w), float32: the target sampler's latents for this noise and these prompts; None without pairs. Of every n-th
    sample only, (B / n, C, h, w), if the others are from no pair."""


def mixed_inputs(fresh: StudentInputs, picked: StudentInputs) -> StudentInputs:
    """Returns B inputs with every n-th replaced by those of B / n pairs, and the pairs' targets."""
    nth = len(fresh.noise) // len(picked.noise)
    noise = fresh.noise.clone()
    noise[::nth] = picked.noise
    return StudentInputs(noise, fresh.conditioning.with_every(nth, picked.conditioning), picked.target)


def image_starts(
    student: StudentGenerator,
    family: Family,
    batch: TrainingBatch,
    target: Tensor | None,
    step: int,
    seed: int,
) -> ImageStarts | None:
    """The samples that begin from an image: the pair's, which has the sample's prompt, or the batch's.

    Args:
        student: with the share of these samples; 0 gives None.
        family: scales the batch's latents.
        batch: the training batch.
        target: (B, C, h, w), float32, scaled latents of the pairs; None takes the batch's.
        step: index of the step that is trained.
        seed: of the run.

    Raises:
        ValueError: if there are no latents.
    """
    if not student.image_starts:
        return None
    if target is None and batch.latents is None:
        raise ValueError(
            "student.init_args.image_starts needs images' latents, and the batch has none: let data.contents name latents, "
            "or set image_starts to 0."
        )
    images = target
    if images is None:
        assert batch.latents is not None
        images = family.scale_latents(batch.latents)
    return draw_image_starts(seed, batch.positions, images, step, student.image_starts)


def with_guidance(
    student: StudentGenerator,
    family: Family,
    conditioning: Conditioning,
    positions: Tensor,
    scale_of_pairs: float | None,
    seed: int,
) -> Conditioning:
    """Conditioning of a student with the guidance scale as an input: scales, and negative prompts; else unchanged.

    Args:
        student: says what it takes.
        family: encodes negative prompts.
        conditioning: of B prompts.
        positions: (B,), int64, of the samples in the run.
        scale_of_pairs: guidance scale of the pairs that the samples are of, which were made without negative prompts; None
            draws a scale and a negative prompt for each sample.
        seed: of the run.
    """
    guidance = student.guidance
    if guidance is None or conditioning.guidance_scales is not None:  # pairs with scales of their own
        return conditioning
    if scale_of_pairs is not None:
        scales = torch.full((len(conditioning),), scale_of_pairs, device=positions.device)
        return replace(conditioning, guidance_scales=scales)
    return drawn_guidance(guidance, family, conditioning, positions, seed)


def drawn_guidance(
    guidance: GuidanceInput, family: Family, conditioning: Conditioning, positions: Tensor, seed: int
) -> Conditioning:
    """B prompts with the guidance scale and the negative prompt that each position draws; arguments as of `with_guidance`."""
    conditioning = replace(conditioning, guidance_scales=guidance.draw(seed, positions))
    if not guidance.negative_prompts:
        return conditioning
    drawn, chosen = guidance.draw_negative_prompts(seed, positions)
    # All of them, since to encode the drawn ones their numbers would have to come to the host.
    known = family.encode_prompts(list(guidance.negative_prompts))
    return conditioning.with_negative_prompts(
        known.prompt_embeds[drawn], _rows(known.pooled_prompt_embeds, drawn), chosen
    )


def _rows(tensor: Tensor | None, index: Tensor) -> Tensor | None:
    return None if tensor is None else tensor[index]
