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

from sdxs_lightning.modules.matched_features import MatchedFeatures
from sdxs_lightning.modules.sample import Roles, Sample
from sdxs_lightning.modules.vital_signs import score_signs
from sdxs_lightning.objectives.distribution_matching import DistributionMatching
from sdxs_lightning.objectives.feature_matching import FeatureMatching
from sdxs_lightning.objectives.regression import Regression
from sdxs_lightning.objectives.segmented_score_distillation import SegmentedScoreDistillation
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
    segmented: SegmentedScoreDistillation | None = None
    """Restricts the timesteps, by the run's progress."""

    def __call__(self, sample: Sample, roles: Roles) -> tuple[Tensor, Scalars]:
        """See `StudentTerm`."""
        assert roles.real_score is not None and roles.fake_score is not None
        timesteps = self.objective.timesteps
        if self.segmented is not None:
            total = roles.schedule.num_train_timesteps
            timesteps = self.segmented.segment(timesteps, roles.progress, total)
        with torch.no_grad():
            noisy = sample.renoise(roles.schedule, timesteps, Stream.SCORE_TIMESTEP, Stream.SCORE_NOISE)
            asked = noisy.latents, noisy.timesteps, sample.conditioning
            fake_logits = None
            if self.objective.f_divergence is None:
                fake_x0 = roles.fake_score.predict(*asked).pred_x0
            else:  # the density ratio at the same noisy samples, from the features of the same pass
                assert roles.discriminator is not None
                (_, fake_x0, _), features = roles.fake_score.predict_with_features(*asked)
                fake_logits = roles.discriminator(features)
            real_x0 = roles.real_score.guided(*asked, self.objective.guidance_scale).pred_x0
        loss = self.objective.loss(sample.latents, real_x0, fake_x0, fake_logits)
        return loss, {"distribution_matching": loss, **score_signs(sample.latents, real_x0, fake_x0)}


@dataclass(frozen=True)
class FeatureMatchingTerm:
    """Statistics of features against those of the target sampler's latents for the same noise and prompt."""

    objective: FeatureMatching
    features: MatchedFeatures

    def __call__(self, sample: Sample, roles: Roles) -> tuple[Tensor, Scalars]:
        """See `StudentTerm`."""
        assert sample.target is not None
        with torch.no_grad():
            targets = self.features(sample.target, sample.conditioning, roles)
        features = self.features(sample.latents, sample.conditioning, roles)
        loss = self.objective.loss(features, targets)
        return loss, {"feature_matching": loss}


@dataclass(frozen=True)
class RegressionTerm:
    """The target sampler's latents for the same noise and prompt."""

    objective: Regression

    def __call__(self, sample: Sample, roles: Roles) -> tuple[Tensor, Scalars]:
        """See `StudentTerm`."""
        assert sample.target is not None
        loss = self.objective.loss(sample.latents, sample.target)
        return loss, {"regression": loss}
