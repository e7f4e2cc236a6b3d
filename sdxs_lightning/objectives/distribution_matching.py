"""Distribution matching: moves the student's samples along the difference of two scores.

At a re-noised sample the frozen base (real score) estimates the clean latents under the data's distribution, the fake score
under the student's. The difference of the two estimates is, up to a factor that depends on the timestep, the gradient of the
KL divergence between the two distributions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sdxs_lightning.core.guidance import guide, rescaled
from sdxs_lightning.core.guidance_scale import read_guidance_scale
from sdxs_lightning.core.seeding import Stream
from sdxs_lightning.core.timesteps import TimestepRange
from sdxs_lightning.objectives.checks import check_same_shape, check_weight
from sdxs_lightning.objectives.diagnostics import guidance_stats, score_stats
from sdxs_lightning.objectives.f_divergence import FDivergence
from sdxs_lightning.objectives.term import (
    DistillationContext,
    LatentSample,
    NoisyLatents,
    Scalars,
    StudentTerm,
)


def distribution_matching_gradient(pred_x0: Tensor, real_x0: Tensor, fake_x0: Tensor) -> Tensor:
    """The gradient g = (fake_x0 - real_x0) / mean_{c,h,w} |pred_x0 - real_x0|, per sample, detached.

    The denominator equalises the scale over timesteps.

    Args:
        pred_x0: (B, 4, h, w), float, the student's clean latents.
        real_x0: same shape, the guided real score's estimate of them from their re-noised version.
        fake_x0: same shape, the fake score's estimate from the same re-noised version.

    Returns:
        (B, 4, h, w), float32, finite where the inputs are.

    Raises:
        ValueError: unless the shapes agree.

    Source: DMD, arXiv:2311.18828, eq. 7 and 8; DMD2, arXiv:2405.14867, section 3.
    """
    check_same_shape(pred_x0=pred_x0, real_x0=real_x0, fake_x0=fake_x0)
    with torch.no_grad():
        real_x0 = real_x0.float()
        distance = (pred_x0.float() - real_x0).abs().mean(dim=(1, 2, 3), keepdim=True)
        gradient = (fake_x0.float() - real_x0) / distance
        # Distance 0 means that the teacher does not change the sample, which then gets no gradient. A departure: DMD2's
        # nan_to_num turns x / 0 into 3e38, which overflows the gradient norm in clipping.
        return torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)


def distribution_matching_loss(pred_x0: Tensor, gradient: Tensor) -> Tensor:
    """0.5 mean((pred_x0 - sg(pred_x0 - g))^2), whose gradient is g / number of elements.

    Its value, 0.5 mean(g^2), does not measure progress, since g is normalised.

    Args:
        pred_x0: (B, 4, h, w), float, the student's clean latents, with their graph.
        gradient: same shape, from `distribution_matching_gradient`; gets no gradient.

    Returns:
        (), float32.

    Raises:
        ValueError: unless the shapes agree.

    Source: the stop-gradient form in which DMD and DMD2 pass the gradient of eq. 7 to autograd.
    """
    check_same_shape(pred_x0=pred_x0, gradient=gradient)
    pred_x0 = pred_x0.float()
    target = (pred_x0 - gradient.float()).detach()
    return 0.5 * (pred_x0 - target).square().mean()


@dataclass(frozen=True)
class DistributionMatching(StudentTerm):
    """Moves the sample along real minus fake score, both evaluated under no_grad at the same re-noised sample."""

    weight: float = 1.0
    """Weight of the loss."""
    guidance_scale: float = 1.75
    """Guidance scale of the real score. DMD2: 1.75 for SD-1.5, chosen for FID (more looks better); 8 for SDXL. A student with
    `guidance` draws its own for each sample, unless this is 1."""
    timesteps: TimestepRange = TimestepRange(20, 980)
    """Timesteps at which the scores are compared; as in DMD2, without the two ends."""
    guidance_rescale: float = 0.0
    """Share, 0 to 1, by which the guided estimate is rescaled to the standard deviation of the unguided one, against
    over-saturation at large scales (arXiv:2305.08891, eq. 15 and 16); 0 is DMD2."""
    guidance_timesteps: TimestepRange | None = None
    """Timesteps at which the real score is guided; at the others it is unguided (decoupled guidance, arXiv:2511.22677). null
    guides at all, as DMD2 does."""
    fake_guidance_scale: float = 1.0
    """Guidance scale of the fake score, which then has to learn without prompts too, by `denoising.caption_dropout` (long and
    short guidance, SiD-LSG, arXiv:2406.01561). 1 means none, as in DMD2; else a student with `guidance`
    draws its own, as above."""
    f_divergence: FDivergence | None = None
    """Another divergence than the reverse KL, with the density ratio of a diffusion GAN's discriminator; null is DMD2."""

    needs_real_score = True
    needs_fake_score = True

    def __post_init__(self) -> None:
        check_weight("DistributionMatching", weight=self.weight)
        scale = read_guidance_scale("distribution_matching.guidance_scale", self.guidance_scale)
        object.__setattr__(self, "guidance_scale", scale)
        fake_scale = read_guidance_scale(
            "distribution_matching.fake_guidance_scale", self.fake_guidance_scale
        )
        object.__setattr__(self, "fake_guidance_scale", fake_scale)
        if fake_scale != 1.0 and self.f_divergence is not None:
            raise ValueError(
                f"distribution_matching.fake_guidance_scale is {fake_scale}, but f_divergence reads the discriminator in an "
                "unguided pass of the fake score; set fake_guidance_scale to 1, or f_divergence to null."
            )
        if scale == 1.0 and (self.guidance_rescale or self.guidance_timesteps is not None):
            raise ValueError(
                "distribution_matching.guidance_scale is 1, which is no guidance, so guidance_rescale and guidance_timesteps "
                "change nothing: raise it, or set guidance_rescale to 0 and guidance_timesteps to null."
            )
        if not 0 <= self.guidance_rescale <= 1:
            raise ValueError(
                f"distribution_matching.guidance_rescale must be in [0, 1], got {self.guidance_rescale}."
            )

    @property
    def needs_discriminator(self) -> bool:  # type: ignore[override]
        return self.f_divergence is not None

    def __call__(self, sample: LatentSample, context: DistillationContext) -> tuple[Tensor, Scalars]:
        assert context.real_score is not None and context.fake_score is not None
        with torch.no_grad():
            noisy = sample.renoise(
                context.schedule, self.timesteps, Stream.SCORE_TIMESTEP, Stream.SCORE_NOISE
            )
            fake_logits = None
            if self.f_divergence is None:
                fake_x0 = context.fake_score.denoiser.guided(
                    noisy.latents,
                    noisy.timesteps,
                    sample.conditioning,
                    sample.guidance_scale(self.fake_guidance_scale),
                ).pred_x0
            else:  # the density ratio comes from the same noisy samples and the same pass
                assert context.discriminator is not None
                (_, fake_x0, _), features = context.fake_score.predict_with_features(
                    noisy.latents, noisy.timesteps, sample.conditioning
                )
                fake_logits = context.discriminator(features)
            real_x0, cond_x0 = self._real_x0(noisy, sample, context)
        loss = self.loss(sample.latents, real_x0, fake_x0, fake_logits)
        stats = score_stats(sample.latents, real_x0, fake_x0) | guidance_stats(real_x0, cond_x0, fake_x0)
        return loss, {"distribution_matching": loss, **stats}

    def _real_x0(
        self, noisy: NoisyLatents, sample: LatentSample, context: DistillationContext
    ) -> tuple[Tensor, Tensor]:
        """The real score's estimate of the clean latents with guidance and without."""
        assert context.real_score is not None
        known = noisy.latents, noisy.timesteps, sample.conditioning
        scale = sample.guidance_scale(self.guidance_scale)
        if not isinstance(scale, Tensor) and scale == 1.0:
            cond_x0 = context.real_score(*known).pred_x0
            return cond_x0, cond_x0
        cond, uncond = context.real_score.unguided_pair(*known)
        guided = guide(cond.pred_x0, uncond.pred_x0, scale)
        if self.guidance_rescale:
            guided = rescaled(guided, cond.pred_x0, self.guidance_rescale)
        if self.guidance_timesteps is not None:
            inside = self.guidance_timesteps.contains(noisy.timesteps).view(-1, 1, 1, 1)
            guided = torch.where(inside, guided, cond.pred_x0)
        return guided, cond.pred_x0

    def loss(
        self, pred_x0: Tensor, real_x0: Tensor, fake_x0: Tensor, fake_logits: Tensor | None = None
    ) -> Tensor:
        """Weighted `distribution_matching_loss` along `distribution_matching_gradient`: (), float32.

        Args:
            pred_x0: (B, 4, h, w), float, the student's clean latents, with their graph.
            real_x0: same shape, the guided real score's estimate of them from their re-noised version.
            fake_x0: same shape, the fake score's.
            fake_logits: (B,), float, the discriminator's at the re-noised version; only `f_divergence` reads them.
        """
        gradient = distribution_matching_gradient(pred_x0, real_x0, fake_x0)
        if self.f_divergence is not None:
            assert fake_logits is not None
            gradient = gradient * self.f_divergence.weights(fake_logits)
        return self.weight * distribution_matching_loss(pred_x0, gradient)
