"""The guidance scale as an input of a U-Net, so that one student serves a range of scales."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sdxs_lightning.core.errors import UserError
from sdxs_lightning.core.option_bounds import LARGEST_SCALE
from sdxs_lightning.core.seeding import Stream, integers, uniform

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

LEARNT = "_student_guidance"
"""Key in the config of a student's U-Net: what it learnt. diffusers keeps such private keys when it loads and saves, and reads
none of them."""


@dataclass(frozen=True)
class GuidanceInput:
    """Range of the guidance scales that a student learns.

    Raises:
        ValueError: unless 1 <= low <= default <= high <= LARGEST_SCALE and low < high, or for dimensions, a share
            or negative prompts that cannot be.
    """

    low: float = 1.0
    """Smallest scale; 1 means none."""
    high: float = 4.5
    """Largest scale."""
    default: float = 1.75
    """Scale of the images that are made during training."""
    dimensions: int = 256
    """Dimensions of the embedding, even; 256 is LCM's."""
    negative_prompts: tuple[str, ...] = ()
    """Negative prompts of training samples, which the real score is guided away from; each sample draws one. The student gets
    the prompt's embeddings plus the unconditional ones minus those of the negative prompt. All are encoded in every iteration:
    dozens rather than thousands."""
    negative_share: float = 0.5
    """Share of the samples that have one."""

    def __post_init__(self) -> None:
        got = f"got low {self.low}, default {self.default}, high {self.high}"
        if not 1 <= self.low <= self.default <= self.high <= LARGEST_SCALE:
            raise ValueError(f"student.guidance needs 1 <= low <= default <= high <= {LARGEST_SCALE}, {got}.")
        if self.low == self.high:
            raise ValueError(
                f"student.guidance is the range of one scale, {got}: widen it, or set student.guidance to null and "
                "distribution_matching.guidance_scale to that scale."
            )
        if self.dimensions < 4 or self.dimensions % 2:
            raise ValueError(f"student.guidance.dimensions must be even, 4 or more, got {self.dimensions}.")
        if not 0 < self.negative_share <= 1:
            raise ValueError(
                f"student.guidance.negative_share is a share above 0 and up to 1, got {self.negative_share}; without negative "
                "prompts leave negative_prompts empty."
            )
        if isinstance(self.negative_prompts, str) or not all(map(str.strip, self.negative_prompts)):
            raise ValueError(
                f"student.guidance.negative_prompts is a list of prompts that are not empty, got {self.negative_prompts!r}."
            )

    def draw(self, seed: int, positions: Tensor) -> Tensor:
        """Guidance scales (B,), float32, uniform in the range."""
        return self.low + (self.high - self.low) * uniform(seed, Stream.GUIDANCE_SCALE, positions)

    def draw_negative_prompts(self, seed: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Index (B,), int64, of each sample's negative prompt, and which samples have theirs: (B,), bool."""
        drawn = integers(seed, Stream.NEGATIVE_PROMPT, positions, 0, len(self.negative_prompts))
        return drawn, uniform(seed, Stream.NEGATIVE_SHARE, positions) < self.negative_share


def guidance_embedding(guidance_scales: Tensor, dimensions: int) -> Tensor:
    """Sinusoidal embedding of 1000 (w - 1): sines, then cosines.

    Args:
        guidance_scales: (B,), float32, w; 1 means none.
        dimensions: even.

    Returns:
        (B, dimensions), float32.

    Source: LCM, arXiv:2310.04378, as `get_guidance_scale_embedding` of diffusers' pipelines, which get w - 1.
    """
    half = dimensions // 2
    exponents = torch.arange(half, dtype=torch.float32, device=guidance_scales.device) / (half - 1)
    frequencies = torch.exp(-math.log(10000.0) * exponents)
    angles = 1000.0 * (guidance_scales.float()[:, None] - 1.0) * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def add_guidance_input(unet: UNet2DConditionModel, dimensions: int) -> None:
    """Gives a U-Net the projection of a guidance embedding, unless it has one; the new one changes nothing at first.

    Args:
        unet: changed in place, weights and config.
        dimensions: of the embedding.

    Raises:
        ValueError: if the U-Net has one of other dimensions.
    """
    found = unet.config["time_cond_proj_dim"]
    if found == dimensions:
        return
    if found is not None:
        raise ValueError(
            f"the weights take a guidance embedding of {found} dimensions, and student.init_args.guidance.dimensions is "
            f"{dimensions}; set it to {found}."
        )
    first = unet.time_embedding.linear_1
    projection = nn.Linear(
        dimensions, first.in_features, bias=False, device=first.weight.device, dtype=first.weight.dtype
    )
    nn.init.zeros_(projection.weight)
    unet.time_embedding.cond_proj = projection
    unet.register_to_config(time_cond_proj_dim=dimensions)


def record_learnt(unet: UNet2DConditionModel, guidance: GuidanceInput) -> None:
    """Writes into a U-Net's config the range of scales, and whether there are negative prompts, for the checks below."""
    negative = bool(guidance.negative_prompts)
    unet.register_to_config(
        **{LEARNT: {"low": guidance.low, "high": guidance.high, "negative_prompts": negative}}
    )


def _record(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What a student learnt, as `record_learnt` wrote it, or None; raises UserError for a config that holds something else."""
    learnt = config.get(LEARNT)
    if learnt is None:
        return None
    entries = learnt if isinstance(learnt, Mapping) else {}
    kinds = [type(entries.get(name)) for name in ("low", "high", "negative_prompts")]
    if not (set(kinds[:2]) <= {int, float} and kinds[2] is bool):
        raise UserError(
            f"the U-Net's config.json has {LEARNT} {learnt!r}, which is {{low, high, negative_prompts}} of two numbers and "
            "true or false where this project wrote it: mend it, or delete it, so that nothing is checked."
        )
    return entries


def check_scale_is_learnt(config: Mapping[str, Any], scale: float, name: str) -> None:
    """Raises UserError for a guidance scale that a student did not learn, by its U-Net's config; `name` is the scale's option.

    Nothing is known, and nothing refused, of a student whose config has no record.
    """
    learnt = _record(config)
    if learnt is not None and not learnt["low"] <= scale <= learnt["high"]:
        raise UserError(
            f"{name} is {scale:g}, but the student learnt scales {learnt_range(config)}: give one of these, or train it for "
            "others."
        )


def learnt_range(config: Mapping[str, Any]) -> str:
    """The guidance scales that a student learnt, by its U-Net's config, for messages."""
    learnt = _record(config)
    if learnt is None:
        return "of the range that it was trained for (student.guidance), such as 2; 1 means none"
    return f"from {learnt['low']:g} to {learnt['high']:g} (student.guidance)"


def learns_negative_prompts(config: Mapping[str, Any]) -> bool:
    """Whether a student learnt negative prompts, by its U-Net's config; true without a record."""
    learnt = _record(config)
    return learnt is None or bool(learnt["negative_prompts"])


def check_negative_prompts_are_learnt(config: Mapping[str, Any], texts: Sequence[str]) -> None:
    """Raises UserError for negative prompts of a student that learnt none; "" is none."""
    given = next(filter(None, texts), None)
    if given is not None and not learns_negative_prompts(config):
        raise UserError(
            f"the student learnt no negative prompts (student.guidance.negative_prompts), got '{given}': leave them out, or "
            "train it with some."
        )
