"""What the student is trained on: each term is an objective, applied to a sample by asking the networks.

A term is a callable (sample, context) -> (weighted loss with graph to `sample.latents`, named scalars). The training step
only sums the terms that it is given, so a new mode (feature matching, segmented score distillation, another divergence)
is a new term and a named parameter of the stage, and leaves the step alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sdxs_lightning.core.seeding import Stream
from sdxs_lightning.objectives.distribution_matching import DistributionMatching
from sdxs_lightning.objectives.feature_matching import FeatureMatching
from sdxs_lightning.objectives.regression import Regression
from sdxs_lightning.objectives.segmented_score_distillation import SegmentedScoreDistillation
from sdxs_lightning.stages.distillation.diagnostics import score_stats
from sdxs_lightning.stages.distillation.matched_features import MatchedFeatures
from sdxs_lightning.stages.distillation.sample import DistillationContext, Sample

Scalars = Mapping[str, Tensor]


class StudentTerm(Protocol):
    """One summand of the student's loss."""

    def __call__(self, sample: Sample, context: DistillationContext) -> tuple[Tensor, Scalars]:
        """The weighted loss, (), and scalars for the log."""


@dataclass(frozen=True)
class DistributionMatchingTerm:
    """Moves the sample along real minus fake score, both asked about the same re-noised sample, without graph."""

    objective: DistributionMatching
    segmented: SegmentedScoreDistillation | None = None
    """Restricts the timesteps, by the run's progress."""

    def __call__(self, sample: Sample, context: DistillationContext) -> tuple[Tensor, Scalars]:
        """See `StudentTerm`."""
        assert context.real_score is not None and context.fake_score is not None
        timesteps = self.objective.timesteps
        if self.segmented is not None:
            total = context.schedule.num_train_timesteps
            timesteps = self.segmented.segment(timesteps, context.progress, total)
        with torch.no_grad():
            noisy = sample.renoise(context.schedule, timesteps, Stream.SCORE_TIMESTEP, Stream.SCORE_NOISE)
            asked = noisy.latents, noisy.timesteps, sample.conditioning
            fake_logits = None
            if self.objective.f_divergence is None:
                fake_x0 = context.fake_score.predict(*asked).pred_x0
            else:  # the density ratio at the same noisy samples, from the features of the same pass
                assert context.discriminator is not None
                (_, fake_x0, _), features = context.fake_score.predict_with_features(*asked)
                fake_logits = context.discriminator(features)
            real_x0 = context.real_score.guided(*asked, self.objective.guidance_scale).pred_x0
        loss = self.objective.loss(sample.latents, real_x0, fake_x0, fake_logits)
        return loss, {"distribution_matching": loss, **score_stats(sample.latents, real_x0, fake_x0)}


@dataclass(frozen=True)
class FeatureMatchingTerm:
    """Statistics of features against those of the target sampler's latents for the same noise and prompt."""

    objective: FeatureMatching
    features: MatchedFeatures

    def __call__(self, sample: Sample, context: DistillationContext) -> tuple[Tensor, Scalars]:
        """See `StudentTerm`."""
        assert sample.target is not None
        with torch.no_grad():
            targets = self.features(sample.target, sample.conditioning, context)
        features = self.features(sample.latents, sample.conditioning, context)
        loss = self.objective.loss(features, targets)
        return loss, {"feature_matching": loss}


@dataclass(frozen=True)
class RegressionTerm:
    """The target sampler's latents for the same noise and prompt."""

    objective: Regression

    def __call__(self, sample: Sample, context: DistillationContext) -> tuple[Tensor, Scalars]:
        """See `StudentTerm`."""
        assert sample.target is not None
        loss = self.objective.loss(sample.latents, sample.target)
        return loss, {"regression": loss}
