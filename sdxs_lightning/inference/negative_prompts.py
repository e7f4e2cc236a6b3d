"""Negative prompts of a student that takes them as an input, in stock diffusers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sdxs_lightning.core.batch import Conditioning
from sdxs_lightning.core.errors import UserError
from sdxs_lightning.networks.guidance_input import check_negative_prompts_are_learnt


@torch.no_grad()
def negative_prompt_inputs(
    pipeline: Any, prompts: Sequence[str], negative_prompts: Sequence[str]
) -> dict[str, Tensor]:
    """Arguments with which a pipeline draws prompts under negative ones, instead of `prompt`.

    Args:
        pipeline: a student trained with `student.guidance.negative_prompts`, of the Stable Diffusion or SDXL kind.
        prompts: B prompts.
        negative_prompts: one for each; "" is none.

    Returns:
        `prompt_embeds`, and `pooled_prompt_embeds` for SDXL.

    Raises:
        UserError: for a pipeline without the guidance scale as an input, a single string, or not one
            negative prompt for each prompt.
    """
    if pipeline.unet.config.get("time_cond_proj_dim") is None:
        raise UserError(
            "this model does not take the guidance scale as an input (its U-Net has no time_cond_proj_dim), and so no negative "
            "prompts: train with student.guidance and its negative_prompts, or, for a base, pass negative_prompt."
        )
    if isinstance(prompts, str) or isinstance(negative_prompts, str):
        raise UserError(
            f"prompts and negative prompts are lists of strings, for one image too, got {prompts!r} and {negative_prompts!r}."
        )
    if len(negative_prompts) != len(prompts):
        raise UserError(
            f"{len(negative_prompts)} negative prompts for {len(prompts)} prompts; give one for each."
        )
    check_negative_prompts_are_learnt(pipeline.unet.config, negative_prompts)
    plain, negative = _encoded(pipeline, prompts), _encoded(pipeline, negative_prompts)
    chosen = torch.tensor([bool(one) for one in negative_prompts], device=plain.prompt_embeds.device)
    given = plain.with_negative_prompts(
        negative.prompt_embeds, negative.pooled_prompt_embeds, chosen
    ).shifted()
    inputs = {"prompt_embeds": given.prompt_embeds}
    if given.pooled_prompt_embeds is not None:
        inputs["pooled_prompt_embeds"] = given.pooled_prompt_embeds
    return inputs


def _encoded(pipeline: Any, prompts: Sequence[str]) -> Conditioning:
    """The prompts and their unconditional counterpart, encoded by the pipeline."""
    found = pipeline.encode_prompt(
        prompt=list(prompts),
        device=pipeline._execution_device,  # `device` is the CPU under enable_model_cpu_offload
        num_images_per_prompt=1,
        do_classifier_free_guidance=True,
    )
    embeds, uncond, *pooled = found
    if not pooled:
        return Conditioning(prompt_embeds=embeds, negative_prompt_embeds=uncond)
    return Conditioning(
        prompt_embeds=embeds,
        negative_prompt_embeds=uncond,
        pooled_prompt_embeds=pooled[0],
        negative_pooled_prompt_embeds=pooled[1],
        add_time_ids=embeds.new_zeros(len(embeds), 6),  # the pipeline's own are used
    )
