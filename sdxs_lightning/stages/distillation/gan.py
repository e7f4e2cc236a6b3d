"""What a GAN is to the training step: a term of the student's loss, and a loss of the discriminator.

`DiffusionGan` compares re-noised latents by a U-Net's features; `PixelGan` (`pixel_gan.py`) compares images.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from sdxs_lightning.core.batch import Conditioning, TrainingBatch
from sdxs_lightning.core.seeding import Stream
from sdxs_lightning.families import Family
from sdxs_lightning.networks.discriminator import Discriminator
from sdxs_lightning.networks.feature_taps import bottleneck_shape
from sdxs_lightning.objectives.adversarial import DiffusionAdversarial
from sdxs_lightning.stages.distillation.sample import DistillationContext, Noisy, Sample
from sdxs_lightning.stages.distillation.student_terms import Scalars


class Data(NamedTuple):
    """What the discriminator is shown as real."""

    batch: TrainingBatch
    conditioning: Conditioning
    """Of the batch's own captions."""
    seed: int
    """Of the run."""


class Gan(Protocol):
    """A discriminator with what it looks through, and with both sides' losses.

    The discriminator itself belongs to the stage, which registers, optimises and saves it; what is frozen belongs to the GAN.
    """

    needs_real_score: bool
    """Whether it asks `context.real_score`."""
    reads_denoising_pass: bool
    """Whether `discriminator_loss` takes the features of the pass in which the fake score learns to denoise the sample."""

    def build(self, family: Family, context: DistillationContext) -> None:
        """Loads what is frozen and makes the discriminator's weights; a second call does nothing."""

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Moves what is frozen; `dtype` is that of frozen networks whose precision does not show in images."""

    def frozen_networks(self) -> dict[str, nn.Module]:
        """What is frozen and the GAN's own, by name, for the memory plan."""

    def student_term(self, sample: Sample, context: DistillationContext) -> tuple[Tensor, Scalars]:
        """See `StudentTerm`."""

    def discriminator_loss(
        self, fake: Sample, real: Data, context: DistillationContext, fake_features: Tensor | None
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
            ValueError: for a batch that does not hold what the discriminator is to see.
        """


class DiffusionGan:
    """A head on a U-Net's bottleneck tells re-noised data from re-noised samples.

    Through the fake score, as in DMD2, its loss also trains that network's encoder. Through the real score the features stay
    what the base made them, and two passes of its encoder come on top.

    Args:
        discriminator: the head.
        objective: losses, noise levels, and whose features.
    """

    def __init__(self, discriminator: Discriminator, objective: DiffusionAdversarial) -> None:
        self.discriminator, self.objective = discriminator, objective
        self.needs_real_score = objective.features == "real_score"
        self.reads_denoising_pass = not self.needs_real_score

    def build(self, family: Family, context: DistillationContext) -> None:
        """See `Gan`."""
        self._family = family
        if self.needs_real_score:
            assert context.real_score is not None
            shape = bottleneck_shape(context.real_score.unet, family.latent_shape())
        else:
            assert context.fake_score is not None
            shape = context.fake_score.feature_shape(family.latent_shape())
        self.discriminator.build(shape)

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """See `Gan`: there is nothing of its own."""

    def frozen_networks(self) -> dict[str, nn.Module]:
        """See `Gan`: there is nothing of its own."""
        return {}

    def student_term(self, sample: Sample, context: DistillationContext) -> tuple[Tensor, Scalars]:
        """Makes the re-noised sample look real; the graph goes through the features' network."""
        noisy = sample.renoise(
            context.schedule, self.objective.timesteps, Stream.GAN_TIMESTEP, Stream.GAN_NOISE
        )
        loss = self.objective.student_loss(self.discriminator(self._features(noisy, sample, context)))
        return loss, {"adversarial": loss}

    def discriminator_loss(
        self, fake: Sample, real: Data, context: DistillationContext, fake_features: Tensor | None
    ) -> tuple[Tensor, Scalars]:
        """See `Gan`. Both halves are one batch to the head."""
        data = self._data(real)
        if self.needs_real_score:
            with torch.no_grad():  # the features cannot learn, so nothing is kept for a backward pass
                fake_features = self._seen(fake, context, Stream.FAKE_TIMESTEP, Stream.FAKE_NOISE)
                real_features = self._seen(data, context, Stream.REAL_TIMESTEP, Stream.REAL_NOISE)
        else:
            real_features = self._seen(data, context, Stream.REAL_TIMESTEP, Stream.REAL_NOISE)
        assert fake_features is not None
        fake_logits, real_logits = self.discriminator(torch.cat([fake_features, real_features])).chunk(2)
        loss = self.objective.discriminator_loss(real_logits, fake_logits)
        right = torch.cat([real_logits > 0, fake_logits < 0]).float().mean()
        return loss, {"loss": loss, "accuracy": right}

    def _seen(
        self, sample: Sample, context: DistillationContext, timestep_stream: Stream, noise_stream: Stream
    ) -> Tensor:
        noisy = sample.renoise(context.schedule, self.objective.timesteps, timestep_stream, noise_stream)
        return self._features(noisy, sample, context)

    def _features(self, noisy: Noisy, sample: Sample, context: DistillationContext) -> Tensor:
        """(B, C', h', w') of the noisy latents, with graph where they have one."""
        asked = noisy.latents, noisy.timesteps, sample.conditioning
        if self.needs_real_score:
            assert context.real_score is not None
            return context.real_score.features(
                *asked
            ).float()  # it may be bfloat16 as a whole; the head is not
        assert context.fake_score is not None
        return context.fake_score.features(*asked)

    def _data(self, real: Data) -> Sample:
        """The batch's own latents."""
        batch, shape = real.batch, self._family.latent_shape()
        if batch.latents is None or tuple(batch.latents.shape[1:]) != shape:
            found = "none" if batch.latents is None else f"shape {tuple(batch.latents.shape[1:])}"
            raise ValueError(
                f"the discriminator needs latents of shape {shape} in every batch and got {found}; make latent shards for "
                "this base and resolution, or set discriminator and adversarial to null."
            )
        return Sample(
            latents=self._family.scale_latents(batch.latents),
            conditioning=real.conditioning,
            positions=batch.positions,
            seed=real.seed,
        )
