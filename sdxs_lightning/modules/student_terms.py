"""What the student is trained on: each term is an objective, applied to a sample by asking the networks.

A term is a callable (sample, roles) -> (weighted loss with graph to `sample.latents`, named scalars). The training step
only sums the terms that it is given, so a new mode (feature matching, segmented score distillation, another divergence)
is a new term and a named parameter of the stage, and leaves the step alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sdxs_lightning.modules.sample import Roles, Sample, mean_absolute
from sdxs_lightning.objectives.adversarial import DiffusionAdversarial
from sdxs_lightning.objectives.distribution_matching import DistributionMatching
from sdxs_lightning.objectives.regression import Regression
from sdxs_lightning.seeding import Stream

Scalars = Mapping[str, Tensor]


class StudentTerm(Protocol):
    """One summand of the student's loss."""

    def __call__(self, sample: Sample, roles: Roles) -> tuple[Tensor, Scalars]:
        """The weighted loss, (), and scalars for the log."""


@dataclass(frozen=True)
class DistributionMatchingTerm:
    """Moves the sample along real minus fake score, both asked about the same re-noised sample, without graph."""

    objective: DistributionMatching

    def __call__(self, sample: Sample, roles: Roles) -> tuple[Tensor, Scalars]:
        """See `StudentTerm`."""
        assert roles.real_score is not None
        with torch.no_grad():
            noisy = sample.renoise(
                roles.schedule, self.objective.timesteps, Stream.SCORE_TIMESTEP, Stream.SCORE_NOISE
            )
            asked = noisy.latents, noisy.timesteps, sample.conditioning
            fake_x0 = roles.fake_score.predict(*asked).pred_x0
            real_x0 = roles.real_score.guided(*asked, self.objective.guidance_scale).pred_x0
        loss = self.objective.loss(sample.latents, real_x0, fake_x0)
        return loss, {"distribution_matching": loss, "score_gap": mean_absolute(fake_x0 - real_x0)}


@dataclass(frozen=True)
class AdversarialTerm:
    """Makes the re-noised sample look real to the discriminator; the graph goes through the fake score's encoder."""

    objective: DiffusionAdversarial

    def __call__(self, sample: Sample, roles: Roles) -> tuple[Tensor, Scalars]:
        """See `StudentTerm`."""
        assert roles.discriminator is not None
        noisy = sample.renoise(
            roles.schedule, self.objective.timesteps, Stream.GAN_TIMESTEP, Stream.GAN_NOISE
        )
        features = roles.fake_score.features(noisy.latents, noisy.timesteps, sample.conditioning)
        loss = self.objective.student_loss(roles.discriminator(features))
        return loss, {"adversarial": loss}


@dataclass(frozen=True)
class RegressionTerm:
    """The warm-up: the target sampler's latents for the same noise and prompt."""

    objective: Regression

    def __call__(self, sample: Sample, roles: Roles) -> tuple[Tensor, Scalars]:
        """See `StudentTerm`."""
        assert sample.target is not None
        loss = self.objective.loss(sample.latents, sample.target)
        return loss, {"regression": loss}
