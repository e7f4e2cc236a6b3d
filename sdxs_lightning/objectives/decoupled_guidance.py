"""The guidance part of the score difference as a term of its own, at timesteps of its own."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sdxs_lightning.core.guidance import guide
from sdxs_lightning.core.guidance_scale import read_guidance_scale
from sdxs_lightning.core.seeding import Stream
from sdxs_lightning.core.timesteps import TimestepRange
from sdxs_lightning.objectives.checks import check_weight
from sdxs_lightning.objectives.distribution_matching import (
    distribution_matching_gradient,
    distribution_matching_loss,
)
from sdxs_lightning.objectives.term import DistillationContext, LatentSample, Scalars, StudentTerm


@dataclass(frozen=True)
class DecoupledGuidance(StudentTerm):
    """Moves the sample from the unguided real score to the guided one; an entry of `objectives`.

    The score difference of distribution matching falls apart into this, (w - 1) (cond - uncond), and the difference of the
    unguided real score and the fake score. So `distribution_matching.guidance_scale` is 1 beside this term. Noise and timesteps
    of its own cost one more pass of the base per student update; `distribution_matching.guidance_timesteps` restricts the
    guidance without that, at the noise of the other part.

    Source: Decoupled DMD, arXiv:2511.22677, which calls it CFG augmentation.
    """

    weight: float = 1.0
    """Weight of the loss."""
    guidance_scale: float = 1.75
    """Guidance scale w of the real score; the default is DMD2's for SD-1.5."""
    timesteps: TimestepRange = TimestepRange(20, 980)
    """Timesteps at which the sample is guided: high ones shape the layout, low ones the detail."""

    needs_real_score = True

    def __post_init__(self) -> None:
        check_weight("DecoupledGuidance", weight=self.weight)
        scale = read_guidance_scale("DecoupledGuidance.guidance_scale", self.guidance_scale)
        if scale == 1.0:
            raise ValueError(
                "DecoupledGuidance.guidance_scale is 1, which is no guidance: raise it, or set this objective to null."
            )
        object.__setattr__(self, "guidance_scale", scale)

    def __call__(self, sample: LatentSample, context: DistillationContext) -> tuple[Tensor, Scalars]:
        assert context.real_score is not None
        with torch.no_grad():
            noisy = sample.renoise(
                context.schedule, self.timesteps, Stream.GUIDANCE_TIMESTEP, Stream.GUIDANCE_NOISE
            )
            cond, uncond = context.real_score.unguided_pair(
                noisy.latents, noisy.timesteps, sample.conditioning
            )
            guided = guide(cond.pred_x0, uncond.pred_x0, sample.guidance_scale(self.guidance_scale))
        # The unguided real score in the fake score's place: what remains of the difference is the guidance.
        gradient = distribution_matching_gradient(sample.latents, guided, cond.pred_x0)
        loss = self.weight * distribution_matching_loss(sample.latents, gradient)
        return loss, {"decoupled_guidance": loss}
