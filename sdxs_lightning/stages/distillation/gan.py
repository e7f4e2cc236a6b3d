"""The GAN of a distillation: a term of the student's loss, and a loss of the discriminator.

`DiffusionGan` compares re-noised latents by a U-Net's features; `PixelGan` (`pixel_gan.py`) compares images.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sdxs_lightning.core.batch import Conditioning, TrainingBatch
from sdxs_lightning.core.seeding import Stream
from sdxs_lightning.families import Family
from sdxs_lightning.networks.discriminator import Discriminator
from sdxs_lightning.networks.feature_taps import bottleneck_shape
from sdxs_lightning.objectives.adversarial import DiffusionAdversarial
from sdxs_lightning.objectives.denoising import Denoising
from sdxs_lightning.objectives.distribution_matching import DistributionMatching
from sdxs_lightning.objectives.term import (
    DistillationContext,
    LatentSample,
    NoisyLatents,
    Scalars,
    StudentTerm,
)


class RealBatch(NamedTuple):
    """The data that the discriminator sees as real."""

    batch: TrainingBatch
    conditioning: Conditioning
    """Of the batch's own captions."""
    seed: int
    """Of the run."""


class Gan(StudentTerm):
    """A discriminator with the features it reads, and both sides' losses.

    The discriminator itself belongs to the stage, which registers, optimises and saves it; what is frozen belongs to the GAN.
    """

    reads_denoising_pass: bool = False
    """Whether `discriminator_loss` takes the features of the pass in which the fake score learns to denoise the sample."""

    def discriminator_loss(
        self, fake: LatentSample, real: RealBatch, context: DistillationContext, fake_features: Tensor | None
    ) -> tuple[Tensor, Scalars]:
        """The discriminator's loss and scalars for the log, `loss` and `accuracy` among them.

        Args:
            fake: the student's sample, without graph.
            real: the batch.
            context: the networks.
            fake_features: (B, C', h', w'), with graph, of the denoising pass over `fake`; None unless `reads_denoising_pass`.

        Returns:
            (), float32, and scalars.

        Raises:
            ValueError: for a batch without the latents or images that the discriminator compares.
        """
        raise NotImplementedError


class DiffusionGan(Gan):
    """A head on a U-Net's bottleneck tells re-noised data from re-noised samples.

    On the fake score's features, as in DMD2, its loss also trains that network's encoder. On the real score's, the features
    stay what the base made them, and two passes of its encoder come on top.

    Args:
        discriminator: the head.
        objective: losses, noise levels, and whose features.
    """

    def __init__(self, discriminator: Discriminator, objective: DiffusionAdversarial) -> None:
        self.discriminator, self.objective = discriminator, objective
        self.needs_real_score = objective.features == "real_score"
        self.needs_fake_score = self.reads_denoising_pass = not self.needs_real_score

    def build(self, family: Family, context: DistillationContext) -> None:
        """Makes the head for the features' shape."""
        self._family = family
        if self.needs_real_score:
            assert context.real_score is not None
            shape = bottleneck_shape(context.real_score.unet, family.latent_shape())
        else:
            assert context.fake_score is not None
            shape = context.fake_score.feature_shape(family.latent_shape())
        self.discriminator.build(shape)

    def __call__(self, sample: LatentSample, context: DistillationContext) -> tuple[Tensor, Scalars]:
        """Makes the re-noised sample look real; the graph goes through the features' network."""
        features = self._renoised_features(sample, context, Stream.GAN_TIMESTEP, Stream.GAN_NOISE)
        loss = self.objective.student_loss(self.discriminator(features))
        return loss, {"adversarial": loss}

    def discriminator_loss(
        self, fake: LatentSample, real: RealBatch, context: DistillationContext, fake_features: Tensor | None
    ) -> tuple[Tensor, Scalars]:
        """See `Gan`. Both halves go through the head as one batch."""
        data = self._data(real)
        with torch.set_grad_enabled(not self.needs_real_score):  # the real score does not learn: no graph
            if self.needs_real_score:
                fake_features = self._renoised_features(
                    fake, context, Stream.FAKE_TIMESTEP, Stream.FAKE_NOISE
                )
            real_features = self._renoised_features(data, context, Stream.REAL_TIMESTEP, Stream.REAL_NOISE)
        assert fake_features is not None
        fake_logits, real_logits = self.discriminator(torch.cat([fake_features, real_features])).chunk(2)
        loss = self.objective.discriminator_loss(real_logits, fake_logits)
        right = torch.cat([real_logits > 0, fake_logits < 0]).float().mean()
        return loss, {"loss": loss, "accuracy": right}

    def _renoised_features(
        self,
        sample: LatentSample,
        context: DistillationContext,
        timestep_stream: Stream,
        noise_stream: Stream,
    ) -> Tensor:
        """(B, C', h', w'), float32, with graph where the sample has one or the features' network learns."""
        noisy: NoisyLatents = sample.renoise(
            context.schedule, self.objective.timesteps, timestep_stream, noise_stream
        )
        network = context.real_score if self.needs_real_score else context.fake_score
        assert network is not None
        features = network.features(noisy.latents, noisy.timesteps, sample.conditioning)
        # The real score may be bfloat16 throughout; the head is not.
        return features.float() if self.needs_real_score else features

    def _data(self, real: RealBatch) -> LatentSample:
        """The batch's own latents."""
        batch, shape = real.batch, self._family.latent_shape()
        if batch.latents is None or tuple(batch.latents.shape[1:]) != shape:
            found = "none" if batch.latents is None else f"shape {tuple(batch.latents.shape[1:])}"
            raise ValueError(
                f"the discriminator needs latents of shape {shape} in every batch and got {found}; make latent shards for "
                "this base and resolution, or set discriminator and adversarial to null."
            )
        return LatentSample(
            latents=self._family.scale_latents(batch.latents),
            conditioning=real.conditioning,
            positions=batch.positions,
            seed=real.seed,
        )


def check_discriminator_timesteps(adversarial: DiffusionAdversarial | None, denoising: Denoising) -> None:
    """Raises ValueError where the discriminator would read a denoising pass over other timesteps than its own."""
    if adversarial is None or adversarial.features != "fake_score":
        return
    if adversarial.timesteps != denoising.timesteps:
        raise ValueError(
            f"adversarial.timesteps ({adversarial.timesteps}) must equal denoising.timesteps ({denoising.timesteps}), "
            "because the discriminator reads the denoising pass."
        )


def check_f_divergence(
    distribution_matching: DistributionMatching | None, adversarial: DiffusionAdversarial | None
) -> None:
    """Raises ValueError unless the discriminator can give the density ratio that f_divergence needs."""
    if distribution_matching is None or distribution_matching.f_divergence is None:
        return
    if adversarial is None or adversarial.features != "fake_score":
        got = "null" if adversarial is None else f"features of the {adversarial.features}"
        raise ValueError(
            "distribution_matching.f_divergence reads the density ratio from a discriminator of noisy latents, so adversarial "
            f"must be set, on features of the fake_score, got {got}; change adversarial, or set f_divergence "
            "to null."
        )
    needed, trained = distribution_matching.timesteps, adversarial.timesteps
    if needed.low < trained.low or needed.high > trained.high:
        raise ValueError(
            f"distribution_matching.f_divergence reads the discriminator at timesteps {needed.low} to {needed.high}, and it "
            f"learns at {trained.low} to {trained.high} only; widen adversarial.timesteps."
        )
