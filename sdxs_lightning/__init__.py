"""One-step, real-time text-to-image models from Stable Diffusion.

Public names, imported on first use: `import sdxs_lightning` loads neither torch nor diffusers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdxs_lightning.core.batch import Conditioning, TrainingBatch
    from sdxs_lightning.core.noise_schedule import NoiseSchedule
    from sdxs_lightning.core.timesteps import TimestepRange
    from sdxs_lightning.families import Family
    from sdxs_lightning.families.sd import StableDiffusion
    from sdxs_lightning.families.sdxl import StableDiffusionXL
    from sdxs_lightning.networks.denoiser import Denoiser
    from sdxs_lightning.networks.discriminator import Discriminator
    from sdxs_lightning.networks.fake_score import FakeScore
    from sdxs_lightning.networks.lora import LoRA
    from sdxs_lightning.networks.projected_discriminator import ProjectedDiscriminator
    from sdxs_lightning.networks.student_generator import StudentGenerator
    from sdxs_lightning.objectives.adversarial import DiffusionAdversarial
    from sdxs_lightning.objectives.denoising import Denoising
    from sdxs_lightning.objectives.distribution_matching import DistributionMatching
    from sdxs_lightning.objectives.f_divergence import FDivergence
    from sdxs_lightning.objectives.feature_matching import FeatureMatching
    from sdxs_lightning.objectives.matched_features import EncoderFeatures, PixelFeatures
    from sdxs_lightning.objectives.pixel_adversarial import PixelAdversarial
    from sdxs_lightning.objectives.regression import Regression
    from sdxs_lightning.objectives.segmented_score_distillation import SegmentedScoreDistillation
    from sdxs_lightning.objectives.term import DistillationContext, LatentSample, StudentTerm
    from sdxs_lightning.pairs.target_pairs import PairSettings
    from sdxs_lightning.stages.decoder import DecoderDistillation
    from sdxs_lightning.stages.distillation.step import OneStepDistillation
    from sdxs_lightning.stages.distillation.update_schedule import UpdateSchedule
    from sdxs_lightning.stages.prune_distill import PrunedUNetDistillation
    from sdxs_lightning.stages.teacher import DenoisingTraining

_MODULES = {
    "Conditioning": "core.batch",
    "TrainingBatch": "core.batch",
    "NoiseSchedule": "core.noise_schedule",
    "TimestepRange": "core.timesteps",
    "Family": "families",
    "StableDiffusion": "families.sd",
    "StableDiffusionXL": "families.sdxl",
    "Denoiser": "networks.denoiser",
    "Discriminator": "networks.discriminator",
    "FakeScore": "networks.fake_score",
    "LoRA": "networks.lora",
    "ProjectedDiscriminator": "networks.projected_discriminator",
    "StudentGenerator": "networks.student_generator",
    "DiffusionAdversarial": "objectives.adversarial",
    "Denoising": "objectives.denoising",
    "DistributionMatching": "objectives.distribution_matching",
    "FDivergence": "objectives.f_divergence",
    "FeatureMatching": "objectives.feature_matching",
    "EncoderFeatures": "objectives.matched_features",
    "PixelFeatures": "objectives.matched_features",
    "PixelAdversarial": "objectives.pixel_adversarial",
    "Regression": "objectives.regression",
    "SegmentedScoreDistillation": "objectives.segmented_score_distillation",
    "DistillationContext": "objectives.term",
    "LatentSample": "objectives.term",
    "StudentTerm": "objectives.term",
    "PairSettings": "pairs.target_pairs",
    "DecoderDistillation": "stages.decoder",
    "OneStepDistillation": "stages.distillation.step",
    "UpdateSchedule": "stages.distillation.update_schedule",
    "PrunedUNetDistillation": "stages.prune_distill",
    "DenoisingTraining": "stages.teacher",
}
"""Public name -> module of this package."""

__all__ = [
    "Conditioning",
    "DecoderDistillation",
    "Denoiser",
    "Denoising",
    "DenoisingTraining",
    "DiffusionAdversarial",
    "Discriminator",
    "DistillationContext",
    "DistributionMatching",
    "EncoderFeatures",
    "FDivergence",
    "FakeScore",
    "Family",
    "FeatureMatching",
    "LatentSample",
    "LoRA",
    "NoiseSchedule",
    "OneStepDistillation",
    "PairSettings",
    "PixelAdversarial",
    "PixelFeatures",
    "ProjectedDiscriminator",
    "PrunedUNetDistillation",
    "Regression",
    "SegmentedScoreDistillation",
    "StableDiffusion",
    "StableDiffusionXL",
    "StudentGenerator",
    "StudentTerm",
    "TimestepRange",
    "TrainingBatch",
    "UpdateSchedule",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_MODULES]
