"""Score identity distillation (SiD): a loss through both scores, in the place of the score difference held constant."""

import math
from dataclasses import dataclass

from torch import Tensor

from sdxs_lightning.core.guidance_scale import read_guidance_scale
from sdxs_lightning.core.seeding import Stream
from sdxs_lightning.core.timesteps import TimestepRange
from sdxs_lightning.objectives.checks import check_same_shape, check_weight
from sdxs_lightning.objectives.diagnostics import score_stats
from sdxs_lightning.objectives.term import DistillationContext, LatentSample, Scalars, StudentTerm


def score_identity_loss(pred_x0: Tensor, real_x0: Tensor, fake_x0: Tensor, alpha: float) -> Tensor:
    """Mean of ((1 - alpha) d^2 + d (fake_x0 - pred_x0)) / mean_{c,h,w} |pred_x0 - real_x0|, with d = real_x0 - fake_x0.

    The denominator, per sample and detached, equalises the scale over timesteps.

    Args:
        pred_x0: (B, 4, h, w), float, the student's clean latents, with their graph.
        real_x0: same shape, the real score's estimate of them from their re-noised version, with its graph.
        fake_x0: same shape, the fake score's.
        alpha: 1 and 1.2 are the paper's.

    Returns:
        (), float32; may be negative.

    Raises:
        ValueError: unless the shapes agree.

    Source: SiD, arXiv:2404.04057, eq. 23.
    """
    check_same_shape(pred_x0=pred_x0, real_x0=real_x0, fake_x0=fake_x0)
    pred_x0, real_x0, fake_x0 = pred_x0.float(), real_x0.float(), fake_x0.float()
    distance = (pred_x0 - real_x0).detach().abs().mean(dim=(1, 2, 3), keepdim=True).clamp_min(1e-8)
    difference = real_x0 - fake_x0
    terms = (1 - alpha) * difference.square() + difference * (fake_x0 - pred_x0)
    return (terms / distance).mean()


@dataclass(frozen=True)
class ScoreIdentity(StudentTerm):
    """SiD as an entry of `objectives`, with `distribution_matching: null`.

    Differentiates both scores by the re-noised sample: in SD-1.5 a student update costs 3.4 passes of the base more than
    distribution matching's (`evaluation/results/passes.json`), and the memory of both networks' activations.

    Source: SiD, arXiv:2404.04057; guidance of both scores, SiD-LSG, arXiv:2406.01561.
    """

    weight: float = 1.0
    """Weight of the loss."""
    alpha: float = 1.0
    """Weight of the second form of the divergence over the first, see `score_identity_loss`; the paper has 1 and 1.2."""
    guidance_scale: float = 1.5
    """Guidance scale of the real score; SiD-LSG reports 1.5, best for FID, to 4.5."""
    fake_guidance_scale: float = 1.0
    """Guidance scale of the fake score, which then has to learn without prompts too, by `denoising.caption_dropout`; long and
    short guidance is the same scale in both. 1 means none."""
    timesteps: TimestepRange = TimestepRange(20, 980)
    """Timesteps at which the scores are compared."""

    needs_real_score = True
    needs_fake_score = True

    def __post_init__(self) -> None:
        check_weight("ScoreIdentity", weight=self.weight)
        for name in ("guidance_scale", "fake_guidance_scale"):
            value = read_guidance_scale(f"ScoreIdentity.{name}", getattr(self, name))
            object.__setattr__(self, name, value)
        if not math.isfinite(self.alpha):
            raise ValueError(
                f"alpha of ScoreIdentity must be a finite number, such as 1 or 1.2, got {self.alpha}."
            )

    def __call__(self, sample: LatentSample, context: DistillationContext) -> tuple[Tensor, Scalars]:
        assert context.real_score is not None and context.fake_score is not None
        noisy = sample.renoise(context.schedule, self.timesteps, Stream.SCORE_TIMESTEP, Stream.SCORE_NOISE)
        known = noisy.latents, noisy.timesteps, sample.conditioning
        real_x0 = context.real_score.guided(*known, sample.guidance_scale(self.guidance_scale)).pred_x0
        fake_x0 = context.fake_score.denoiser.guided(
            *known, sample.guidance_scale(self.fake_guidance_scale)
        ).pred_x0
        loss = self.weight * score_identity_loss(sample.latents, real_x0, fake_x0, self.alpha)
        return loss, {"score_identity": loss, **score_stats(sample.latents, real_x0, fake_x0)}
