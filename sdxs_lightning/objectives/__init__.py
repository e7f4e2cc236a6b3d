"""Training objectives, one file an idea: a pure function of tensors, and a small class with its settings.

The classes are what a YAML file names; each has its weight and returns weighted losses. An objective that is
not wanted is `null` there, not weight 0. All arithmetic is float32, whatever the networks ran in.
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

__all__ = [
    "Denoising",
    "DiffusionAdversarial",
    "DistributionMatching",
    "FDivergence",
    "FeatureMatching",
    "PixelAdversarial",
    "Regression",
    "SegmentedScoreDistillation",
    "denoising_loss",
    "discriminator_loss",
    "distribution_matching_gradient",
    "distribution_matching_loss",
    "divergence_weight",
    "feature_matching_loss",
    "generator_loss",
    "regression_loss",
]
