"""Training objectives: each is a pure function of tensors, its settings, and the student's term if it has one.

YAML files name the settings; each has its weight and returns weighted losses. `null` disables an objective, not weight 0. All
arithmetic is float32, whatever the networks' dtype. A custom objective derives from `StudentTerm`, in any module, and is named
under `objectives` of the stage.
"""

from sdxs_lightning.objectives.adversarial import DiffusionAdversarial, discriminator_loss, generator_loss
from sdxs_lightning.objectives.denoising import Denoising, denoising_loss
from sdxs_lightning.objectives.distribution_matching import (
    DistributionMatching,
    distribution_matching_gradient,
    distribution_matching_loss,
)
from sdxs_lightning.objectives.f_divergence import FDivergence, divergence_weight
from sdxs_lightning.objectives.feature_matching import FeatureMatching, feature_matching_loss
from sdxs_lightning.objectives.pixel_adversarial import PixelAdversarial
from sdxs_lightning.objectives.regression import Regression, regression_loss
from sdxs_lightning.objectives.segmented_score_distillation import SegmentedScoreDistillation
from sdxs_lightning.objectives.term import DistillationContext, LatentSample, StudentTerm

__all__ = [
    "Denoising",
    "DiffusionAdversarial",
    "DistillationContext",
    "DistributionMatching",
    "FDivergence",
    "FeatureMatching",
    "LatentSample",
    "PixelAdversarial",
    "Regression",
    "SegmentedScoreDistillation",
    "StudentTerm",
    "denoising_loss",
    "discriminator_loss",
    "distribution_matching_gradient",
    "distribution_matching_loss",
    "divergence_weight",
    "feature_matching_loss",
    "generator_loss",
    "regression_loss",
]
