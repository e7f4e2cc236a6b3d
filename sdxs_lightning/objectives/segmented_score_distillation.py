"""Segmented score distillation: compares scores at low noise only, and uses feature matching for the rest.

At high noise the two scores agree while the student is still blurred, and where they differ they average over images; the
target sampler's pair from the same noise is more informative there. As the student's distribution comes to overlap the base's,
the segment shrinks to the low noise levels that determine texture, and the weight of feature matching decreases.
"""

import math
from dataclasses import dataclass, replace

from torch import Tensor

from sdxs_lightning.core.timesteps import TimestepRange
from sdxs_lightning.objectives.distribution_matching import DistributionMatching
from sdxs_lightning.objectives.feature_matching import FeatureMatching, FeatureMatchingTerm
from sdxs_lightning.objectives.matched_features import MatchedFeatures
from sdxs_lightning.objectives.term import (
    Balance,
    DistillationContext,
    LatentSample,
    ObjectiveSettings,
    Scalars,
    StudentTerm,
)


def cosine_ramp(start: float, end: float, progress: float) -> float:
    """Half-cosine interpolation from start to end: end + (start - end) (1 + cos(pi progress)) / 2.

    Args:
        start: value at progress 0.
        end: value at progress 1.
        progress: in [0, 1]; clamped.
    """
    share = (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0))) / 2
    return end + (start - end) * share


@dataclass(frozen=True)
class SegmentedScoreDistillation(ObjectiveSettings):
    """Settings of the mode: two ramps over the student updates after the warm-up.

    The gradient is E_{t in [0, alpha T]} [score difference] + lambda * [feature matching]; alpha 1 and lambda 0 at both ends
    is plain score distillation. lambda is relative to the score difference: at 1 both gradients have the same norm at the
    student's latents.

    Source: SDXS, arXiv:2403.16627, eq. 11, where alpha and lambda decrease during training. Their values, the shape of the
        ramps and the unit of lambda are not published and are ours.
    """

    alpha_start: float = 0.95
    """Share of the timesteps, from the clean end, at which scores are compared, at the first update after the warm-up."""
    alpha_end: float = 0.5
    """Its value at the last update."""
    lambda_start: float = 1.0
    """Norm of feature matching's gradient relative to the score difference's, at the first update after the warm-up."""
    lambda_end: float = 0.05
    """Its value at the last update."""

    def __post_init__(self) -> None:
        for name in ("alpha_start", "alpha_end"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"segmented.{name} must be in (0, 1], got {getattr(self, name)}.")
        for name in ("lambda_start", "lambda_end"):
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"segmented.{name} must be 0 or more, got {getattr(self, name)}.")

    @property
    def matches_features(self) -> bool:
        """Whether feature matching is used at all."""
        return self.lambda_start > 0 or self.lambda_end > 0

    def alpha(self, progress: float) -> float:
        """The segment's end at `progress`, as a share of all timesteps."""
        return cosine_ramp(self.alpha_start, self.alpha_end, progress)

    def feature_matching_ratio(self, progress: float) -> float:
        """The value of lambda at `progress`."""
        return cosine_ramp(self.lambda_start, self.lambda_end, progress)

    def segment(self, timesteps: TimestepRange, progress: float, num_train_timesteps: int) -> TimestepRange:
        """The part of `timesteps` that lies in [0, alpha T].

        Args:
            timesteps: range of plain score distillation.
            progress: as in `cosine_ramp`.
            num_train_timesteps: T.

        Raises:
            ValueError: if there is none.
        """
        end = round(self.alpha(progress) * num_train_timesteps)
        if end < timesteps.low:
            raise ValueError(
                f"segmented compares scores up to timestep {end} (alpha {self.alpha(progress):g}), and "
                f"distribution_matching.timesteps begin at {timesteps.low} only: raise segmented.alpha_start and alpha_end, or "
                "lower that."
            )
        return TimestepRange(timesteps.low, min(timesteps.high, end))


class SegmentedDistributionMatching(StudentTerm):
    """Distribution matching on the segment of timesteps at the run's current progress.

    Args:
        objective: the loss, whose timesteps are restricted.
        segmented: the ramp of alpha.
    """

    def __init__(self, objective: DistributionMatching, segmented: SegmentedScoreDistillation) -> None:
        self.objective, self.segmented = objective, segmented
        self.needs_real_score, self.needs_fake_score = objective.needs_real_score, objective.needs_fake_score
        self.needs_discriminator = objective.needs_discriminator

    def widest(self, num_train_timesteps: int) -> TimestepRange:
        """The widest segment of the run, which is its first or its last."""
        ends = (
            self.segmented.segment(self.objective.timesteps, end, num_train_timesteps) for end in (0.0, 1.0)
        )
        return max(ends, key=lambda one: one.high)

    def __call__(self, sample: LatentSample, context: DistillationContext) -> tuple[Tensor, Scalars]:
        total = context.schedule.num_train_timesteps
        timesteps = self.segmented.segment(self.objective.timesteps, context.progress, total)
        return replace(self.objective, timesteps=timesteps)(sample, context)


class BalancedFeatureMatching(FeatureMatchingTerm):
    """Feature matching after the warm-up, with lambda times the gradient norm of distribution matching.

    Args:
        objective: the loss.
        features: the features to compare.
        segmented: the ramp of lambda.
    """

    def __init__(
        self, objective: FeatureMatching, features: MatchedFeatures, segmented: SegmentedScoreDistillation
    ) -> None:
        super().__init__(objective, features)
        self.phase = "distillation"
        self.segmented = segmented

    def balance(self, progress: float) -> Balance:
        return Balance("distribution_matching", self.segmented.feature_matching_ratio(progress))
