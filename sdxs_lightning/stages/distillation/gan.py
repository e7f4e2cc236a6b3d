"""The GAN of a distillation: a term of the student's loss, and the discriminator's loss.

`DiffusionGan` compares re-noised latents through a U-Net's features; `PixelGan` (`pixel_gan.py`) compares images.
"""

from __future__ import annotations

from collections.abc import Mapping
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
    """The discriminator's real data."""

    batch: TrainingBatch
    conditioning: Conditioning
    """Encoded captions of the batch."""
    seed: int
    """Seed of the run."""
    use: int = 0
    """As in `LatentSample`."""


class Gan(StudentTerm):
    """A discriminator, its frozen feature networks, and the losses of both sides.

    The stage registers, optimises and saves the discriminator; the GAN owns the frozen networks.
    """

    reads_denoising_pass: bool = False
    """Whether `discriminator_loss` uses features from the fake score's own denoising pass over the sample."""

    @property
    def acts_in_warmup(self) -> bool:
        """Whether the discriminator learns, and the student from it, during the warm-up."""
        return self.phase != "distillation"

    @property
    def acts_in_distillation(self) -> bool:
        """The same after the warm-up."""
        return self.phase != "warmup"

    def discriminator_loss(
        self, fake: LatentSample, real: RealBatch, context: DistillationContext, fake_features: Tensor | None
    ) -> tuple[Tensor, Scalars]:
        """Returns the discriminator's loss, and scalars for the log, including `loss` and `accuracy`.

        Args:
            fake: the student's sample, detached.
            real: the training batch.
            context: the networks of the stage.
            fake_features: (B, C', h', w'), with graph, from the denoising pass over `fake`; None unless `reads_denoising_pass`.

        Returns:
            The loss, (), float32, and the scalars.

        Raises:
            ValueError: if the batch lacks the latents or images that the discriminator compares.
        """
        raise NotImplementedError


class DiffusionGan(Gan):
    """A discriminator head on a U-Net's bottleneck, between re-noised data and re-noised samples.

    With the fake score's features, as in DMD2, its loss also trains that network's encoder. With the real score's, the
    features stay fixed, at the cost of two more passes of its encoder.

    Args:
        discriminator: the head.
        objective: losses, noise levels, and the network that provides the features.
    """

    def __init__(self, discriminator: Discriminator, objective: DiffusionAdversarial) -> None:
        self.discriminator, self.objective = discriminator, objective
        self.phase = objective.phase
        self.needs_real_score = objective.features == "real_score"
        self.needs_fake_score = self.reads_denoising_pass = not self.needs_real_score

    def build(self, family: Family, context: DistillationContext) -> None:
        self._family = family
        if self.needs_real_score:
            assert context.real_score is not None
            shape = bottleneck_shape(context.real_score.unet, family.latent_shape())
        else:
            assert context.fake_score is not None
            shape = context.fake_score.feature_shape(family.latent_shape())
        self.discriminator.build(shape)

    def __call__(self, sample: LatentSample, context: DistillationContext) -> tuple[Tensor, Scalars]:
        """The student's adversarial loss on the re-noised sample, differentiated through the feature network."""
        features = self._renoised_features(sample, context, Stream.GAN_TIMESTEP, Stream.GAN_NOISE)
        loss = self.objective.student_loss(self.discriminator(features))
        return loss, {"adversarial": loss}

    def discriminator_loss(
        self, fake: LatentSample, real: RealBatch, context: DistillationContext, fake_features: Tensor | None
    ) -> tuple[Tensor, Scalars]:
        data = self._data(real)
        with torch.set_grad_enabled(not self.needs_real_score):  # the real score is frozen
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
        """Bottleneck features of the re-noised sample: (B, C', h', w'), float32."""
        noisy: NoisyLatents = sample.renoise(
            context.schedule, self.objective.timesteps, timestep_stream, noise_stream
        )
        network = context.real_score if self.needs_real_score else context.fake_score
        assert network is not None
        features = network.features(noisy.latents, noisy.timesteps, sample.conditioning)
        # The real score may be bfloat16; the head is float32.
        return features.float() if self.needs_real_score else features

    def _data(self, real: RealBatch) -> LatentSample:
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
            use=real.use,
        )


def check_discriminator_timesteps(adversarial: DiffusionAdversarial | None, denoising: Denoising) -> None:
    """Raises ValueError if the discriminator reads the denoising pass and their timesteps differ."""
    if adversarial is None or adversarial.features != "fake_score":
        return
    if adversarial.phase != "distillation":
        raise ValueError(
            f"adversarial.phase is '{adversarial.phase}', and the fake score, whose features the discriminator reads, is not "
            "trained in the warm-up: set adversarial.features to real_score, or adversarial.phase to distillation."
        )
    if adversarial.timesteps != denoising.timesteps:
        raise ValueError(
            f"adversarial.timesteps ({adversarial.timesteps}) must equal denoising.timesteps ({denoising.timesteps}), "
            "because the discriminator reads the denoising pass."
        )


def check_f_divergence(
    distribution_matching: DistributionMatching | None, adversarial: DiffusionAdversarial | None
) -> None:
    """Raises ValueError unless the discriminator provides the density ratio that f_divergence needs."""
    if distribution_matching is None or distribution_matching.f_divergence is None:
        return
    if adversarial is None or adversarial.features != "fake_score":
        got = "null" if adversarial is None else f"features of the {adversarial.features}"
        raise ValueError(
            "distribution_matching.f_divergence reads the density ratio from a discriminator of noisy latents, so adversarial "
            f"must be set, on features of the fake_score, got {got}; change adversarial, or set f_divergence "
            "to null."
        )


def check_caption_dropout(
    denoising: Denoising,
    terms: Mapping[str, StudentTerm | None],
    adversarial: DiffusionAdversarial | None,
) -> None:
    """Raises ValueError unless the fake score learns without prompts where that is used, and only where it does no harm."""
    dropout = denoising.caption_dropout
    guided = [name for name, term in terms.items() if getattr(term, "fake_guidance_scale", 1.0) != 1.0]
    if guided and not dropout:
        raise ValueError(
            f"{guided[0]}.fake_guidance_scale guides the fake score, which learns no unconditional prompt: set "
            "denoising.caption_dropout, such as to 0.1, or fake_guidance_scale to 1."
        )
    if dropout and adversarial is not None and adversarial.features == "fake_score":
        raise ValueError(
            f"denoising.caption_dropout is {dropout}, and the discriminator reads the denoising pass, where it would tell "
            "samples from data by their missing prompts: set adversarial.features to real_score, or caption_dropout to 0."
        )
