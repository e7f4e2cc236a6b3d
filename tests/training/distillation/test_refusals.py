"""Parts and data that do not go together."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from sdxs_lightning.core.timesteps import TimestepRange
from sdxs_lightning.networks.fake_score import FakeScore
from sdxs_lightning.networks.student_generator import StudentGenerator
from sdxs_lightning.objectives.adversarial import DiffusionAdversarial
from sdxs_lightning.objectives.decoupled_guidance import DecoupledGuidance
from sdxs_lightning.objectives.denoising import Denoising
from sdxs_lightning.objectives.distribution_matching import DistributionMatching
from sdxs_lightning.objectives.feature_matching import FeatureMatching
from sdxs_lightning.objectives.matched_features import EncoderFeatures
from sdxs_lightning.objectives.regression import Regression
from sdxs_lightning.objectives.score_identity import ScoreIdentity
from sdxs_lightning.objectives.segmented_score_distillation import SegmentedScoreDistillation
from sdxs_lightning.objectives.term import Balance, StudentTerm
from sdxs_lightning.pairs.target_pairs import PairSettings
from tests.helpers.tiny_distillation import (
    WARMUP,
    WARMUP_ONLY,
    distillation,
)

Base = Callable[[str], Path]

SGD = partial(torch.optim.SGD, lr=0.1)


class ReadsDiscriminator(StudentTerm):
    needs_discriminator = True


class ReadsFakeScore(StudentTerm):
    phase = "warmup"
    needs_fake_score = True


class Wraps(StudentTerm):
    needs_fake_score = True
    objective = DiffusionAdversarial(timesteps=TimestepRange(0, 981))


class Led(StudentTerm):
    def balance(self, progress: float) -> Balance:
        return Balance("distribution_matching", 1.0)


SEGMENTED: dict[str, Any] = {
    "gan": False,
    "segmented": SegmentedScoreDistillation(alpha_start=0.3, alpha_end=0.7, lambda_start=0.0, lambda_end=0.0),
}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gan": False, "adversarial": DiffusionAdversarial()}, "go together"),
        ({"gan": False, "distribution_matching": None}, "the student has no objective"),
        ({"denoising": Denoising(timesteps=TimestepRange(0, 500))}, "must equal denoising.timesteps"),
        (WARMUP, "pairs are set, but update_schedule.warmup_updates is 0"),
        ({"update_schedule": WARMUP_ONLY}, "the warm-up has no objective"),
        (
            {"update_schedule": WARMUP_ONLY, "regression": Regression()},
            "objective regression needs pairs: set model.init_args.pairs, or regression to null",
        ),
        (
            {"fake_score": None, "gan": False},
            r"goes on after the warm-up \(0 of 1000000 updates\) and fake_score is null",
        ),
        ({"feature_matching": FeatureMatching()}, "feature_matching and features go together"),
        ({"segmented": SegmentedScoreDistillation()}, "segmented needs feature_matching and features"),
        (
            {
                "segmented": SegmentedScoreDistillation(),
                "feature_matching": FeatureMatching(phase="always"),
                "features": EncoderFeatures(),
            },
            "set feature_matching.phase to warmup",
        ),
        (
            {"segmented": SegmentedScoreDistillation(), "distribution_matching": None},
            "segmented restricts distribution_matching, which is null",
        ),
        (
            {"gan": False, "objectives": {"reader": ReadsDiscriminator()}},
            r"objective reader needs discriminator: set model.init_args.discriminator \(a Discriminator of latents",
        ),
        (
            WARMUP
            | {"update_schedule": WARMUP_ONLY, "gan": False, "fake_score": None}
            | {"objectives": {"early": ReadsFakeScore()}},
            "objective early needs fake_score: set model.init_args.fake_score, or early to null",
        ),
        (
            {"gan": False, "objectives": {"led": Led()}, "distribution_matching": None},
            "objective led is balanced against distribution_matching, which is not set",
        ),
        (
            WARMUP | {"update_schedule": WARMUP_ONLY, "pairs": PairSettings(sampler_steps=1001)},
            "pairs.sampler_steps is 1001, and the base has 1000 timesteps",
        ),
        ({"accumulate_grad_batches": 0}, "accumulate_grad_batches must be 1 or more"),
        ({"gradient_clip_norm": 0.0}, "gradient_clip_norm must be above 0, or null for no clipping, got 0.0"),
        ({"gradient_clip_norm": -1.0}, "gradient_clip_norm must be above 0"),
        (
            {"distribution_matching": DistributionMatching(timesteps=TimestepRange(20, 1000))},
            r"distribution_matching.timesteps must be in \[0, 999\], the base's timesteps, got low 20 and high 1000",
        ),
        (
            {"gan": False, "denoising": Denoising(timesteps=TimestepRange(0, 1000))},
            r"denoising.timesteps must be in \[0, 999\]",
        ),
        (
            {"gan": False, "distribution_matching": None}
            | {"objectives": {"guidance": DecoupledGuidance(), "sid": ScoreIdentity(guidance_scale=2.0)}},
            "objectives.guidance is the guidance of the sample, and objectives.sid.guidance_scale is 2, which guides it",
        ),
        (
            {"gan": False, "denoising": Denoising(timesteps=TimestepRange(20, 979))},
            "distribution_matching.timesteps are 20 to 980, and the fake score, which it reads there, learns at "
            "denoising.timesteps 20 to 979 only",
        ),
        (
            {"gan": False, "denoising": Denoising(timesteps=TimestepRange(0, 980))}
            | {
                "objectives": {"sid": ScoreIdentity(timesteps=TimestepRange(0, 981))},
                "distribution_matching": None,
            },
            "sid.timesteps are 0 to 981, and the fake score",
        ),
        (
            {"gan": False, "denoising": Denoising(timesteps=TimestepRange(0, 980))}
            | {"objectives": {"own": Wraps()}},
            "own.timesteps are 0 to 981, and the fake score",
        ),
        (
            SEGMENTED | {"distribution_matching": DistributionMatching(timesteps=TimestepRange(301, 980))},
            r"segmented compares scores up to timestep 300 \(alpha 0.3\), and distribution_matching.timesteps begin at 301",
        ),
        (
            SEGMENTED | {"denoising": Denoising(timesteps=TimestepRange(0, 699))},
            "distribution_matching.timesteps are 20 to 700 at most, by segmented, and the fake score",
        ),
        (
            SEGMENTED
            | {"distribution_matching": DistributionMatching(guidance_timesteps=TimestepRange(701, 980))},
            "guidance_timesteps is 701 to 980, and distribution_matching.timesteps 20 to 700 at most, by segmented, so that "
            "nothing is guided",
        ),
        (
            {"distribution_matching": DistributionMatching(guidance_timesteps=TimestepRange(0, 19))},
            "guidance_timesteps is 0 to 19, and distribution_matching.timesteps 20 to 980, so that nothing is guided",
        ),
        (
            {"objectives": {"sid": ScoreIdentity()}},
            "objectives.sid is in the place of the score difference, and distribution_matching is set too",
        ),
        (
            {"objectives": {"decoupled": DecoupledGuidance()}},
            "objectives.decoupled is the guidance of the sample, and distribution_matching.guidance_scale is 1.75",
        ),
    ],
)
def test_parts_that_do_not_go_together(base: Base, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        distillation(base("sd-epsilon"), **settings)


def test_the_fake_score_need_not_learn_above_the_widest_segment(base: Base) -> None:
    learnt = Denoising(timesteps=TimestepRange(20, 700))
    assert distillation(base("sd-epsilon"), **SEGMENTED, denoising=learnt).denoising is learnt


@pytest.mark.parametrize(
    ("settings", "option"),
    [
        ({"student": StudentGenerator(SGD, weights="nowhere")}, "student.init_args.weights"),
        ({"fake_score": FakeScore(SGD, weights="nowhere")}, "fake_score.init_args.weights"),
        (
            WARMUP | {"update_schedule": WARMUP_ONLY, "pairs": PairSettings(weights="nowhere")},
            "pairs.weights",
        ),
    ],
)
def test_missing_weights_are_named_by_their_option(base: Base, settings: dict[str, Any], option: str) -> None:
    with pytest.raises(FileNotFoundError, match=rf"^{option} 'nowhere' is neither a U-Net folder"):
        distillation(base("sd-epsilon"), **settings).configure_model()
