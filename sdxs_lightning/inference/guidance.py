"""The guidance scale and negative prompts as inputs of a student that was trained with `student.guidance`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any

import torch

from sdxs_lightning.core.errors import UserError
from sdxs_lightning.core.guidance_scale import read_guidance_scale
from sdxs_lightning.families.folders import read_json
from sdxs_lightning.inference.inputs import prompt_list
from sdxs_lightning.inference.model_folder import ModelFolder
from sdxs_lightning.inference.networks import Prompts
from sdxs_lightning.networks.guidance_input import (
    check_negative_prompts_are_learnt,
    check_scale_is_learnt,
    guidance_embedding,
    learnt_range,
)


def with_guidance(
    model: ModelFolder,
    encode: Callable[[Sequence[str]], Prompts],
    prompts: Prompts,
    guidance_scale: float | None,
    negative_prompts: str | Sequence[str] | None,
) -> Prompts:
    """Gives embedded prompts what such a student takes; those of other students stay as they are.

    Args:
        model: the student's folder.
        encode: embeds texts.
        prompts: B embedded prompts.
        guidance_scale: 1 means none.
        negative_prompts: one for all or for each; "" is none.

    Raises:
        UserError: if the student needs a scale and there is none, or does not take what there is; for negative prompts of
            another number.
    """
    dimensions = model.unet_config.get("time_cond_proj_dim")
    if dimensions is None:
        for name, value in (("guidance_scale", guidance_scale), ("negative_prompts", negative_prompts)):
            if value is not None:
                raise UserError(
                    f"`{name}` is {value!r}, but the student in '{model.path}' takes none (its U-Net has no "
                    "time_cond_proj_dim): leave it out, or train one with student.guidance, as "
                    "configs/methods/guidance_input.yaml does."
                )
        return prompts
    if guidance_scale is None:
        raise UserError(
            f"the student in '{model.path}' takes the guidance scale as an input: give `guidance_scale`, a number "
            f"{learnt_range(model.unet_config)}."
        )
    if not isinstance(guidance_scale, Real):
        raise UserError(
            f"`guidance_scale` is {guidance_scale!r}, but must be one number of at least 1 for all prompts, where 1 means no "
            "guidance."
        )
    try:
        scale = read_guidance_scale("`guidance_scale`", guidance_scale)
    except ValueError as error:
        raise UserError(str(error)) from error
    check_scale_is_learnt(model.unet_config, scale, "`guidance_scale`")
    scales = torch.full((len(prompts.embeds),), scale, device=prompts.embeds.device)
    embedded = guidance_embedding(scales, dimensions).to(prompts.embeds.dtype)
    return _with_negative(model, encode, replace(prompts, guidance=embedded), negative_prompts)


def _with_negative(
    model: ModelFolder,
    encode: Callable[[Sequence[str]], Prompts],
    prompts: Prompts,
    negative_prompts: str | Sequence[str] | None,
) -> Prompts:
    """The prompts with the unconditional encoding minus that of their negative prompts, as in training."""
    if negative_prompts is None:
        return prompts
    count = len(prompts.embeds)
    several = isinstance(negative_prompts, Iterable) and not isinstance(negative_prompts, str)
    texts: list[Any] = list(negative_prompts) if several else [negative_prompts] * count
    if len(texts) != count:
        raise UserError(
            f"{len(texts)} negative prompts for {count} prompts; give one for all, or one for each."
        )
    texts = prompt_list(texts, "negative_prompts")
    check_negative_prompts_are_learnt(model.unet_config, texts)
    none, negative = encode([""]), encode(texts)
    if _empty_is_zero(model):
        pooled = None if none.pooled is None else torch.zeros_like(none.pooled)
        none = Prompts(torch.zeros_like(none.embeds), pooled)
    given = torch.tensor([bool(text) for text in texts], device=prompts.embeds.device)
    shift = torch.where(given[:, None, None], none.embeds - negative.embeds, 0.0)
    pooled_shift = None
    if none.pooled is not None and negative.pooled is not None:
        pooled_shift = torch.where(given[:, None], none.pooled - negative.pooled, 0.0)
    return replace(prompts, shift=shift, pooled_shift=pooled_shift)


def _empty_is_zero(model: ModelFolder) -> bool:
    """Whether the unconditional encoding is zeros, as diffusers' SDXL pipelines have it unless the folder says otherwise."""
    index = read_json(model.path / "model_index.json")
    return model.has_pooled_prompts and bool(index.get("force_zeros_for_empty_prompt", True))
