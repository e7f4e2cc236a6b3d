"""Which parts of a one-step distillation go together, and the student's terms that follow from them."""

from __future__ import annotations

from sdxs_lightning.networks.discriminator import Discriminator
from sdxs_lightning.networks.image_features import ImageFeatures
from sdxs_lightning.networks.projected_discriminator import ProjectedDiscriminator
from sdxs_lightning.objectives.adversarial import DiffusionAdversarial
from sdxs_lightning.objectives.denoising import Denoising
from sdxs_lightning.objectives.distribution_matching import DistributionMatching
from sdxs_lightning.objectives.feature_matching import FeatureMatching
from sdxs_lightning.objectives.pixel_adversarial import PixelAdversarial
from sdxs_lightning.objectives.regression import Regression
from sdxs_lightning.objectives.segmented_score_distillation import SegmentedScoreDistillation
from sdxs_lightning.stages.distillation.gan import DiffusionGan, Gan
from sdxs_lightning.stages.distillation.matched_features import MatchedFeatures
from sdxs_lightning.stages.distillation.pixel_gan import PixelGan
from sdxs_lightning.stages.distillation.student_terms import (
    DistributionMatchingTerm,
    FeatureMatchingTerm,
    RegressionTerm,
    StudentTerm,
)
from sdxs_lightning.stages.distillation.update_schedule import UpdateSchedule

Terms = dict[str, StudentTerm]


def gan_of(
    discriminator: Discriminator | ProjectedDiscriminator | None,
    adversarial: DiffusionAdversarial | None,
    pixel_adversarial: PixelAdversarial | None,
    image_features: ImageFeatures | None,
) -> Gan | None:
    """The GAN that a config's parts make; None where it names none.

    Raises:
        ValueError: for parts that do not go together.
    """
    match discriminator, adversarial, pixel_adversarial, image_features:
        case None, None, None, None:
            return None
        case Discriminator(), DiffusionAdversarial(), None, None:
            return DiffusionGan(discriminator, adversarial)
        case ProjectedDiscriminator(), None, PixelAdversarial(), source if source is not None:
            return PixelGan(discriminator, pixel_adversarial, source)
    found = {
        "discriminator": discriminator,
        "adversarial": adversarial,
        "pixel_adversarial": pixel_adversarial,
        "image_features": image_features,
    }
    named = [f"{name} {type(part).__name__}" for name, part in found.items() if part is not None]
    raise ValueError(
        "these go together: discriminator (a Discriminator) and adversarial, or discriminator (a ProjectedDiscriminator), "
        f"pixel_adversarial and image_features; got {', '.join(named)}. Set all of a group and the rest to null."
    )


def warmup_terms(
    regression: Regression | None, feature_matching: FeatureMatching | None, features: MatchedFeatures | None
) -> Terms:
    """What the student descends in the warm-up."""
    terms: Terms = {}
    if regression is not None:
        terms["regression"] = RegressionTerm(regression)
    if feature_matching is not None and features is not None:
        terms["feature_matching"] = FeatureMatchingTerm(feature_matching, features)
    return terms


def terms_after_warmup(
    distribution_matching: DistributionMatching | None,
    segmented: SegmentedScoreDistillation | None,
    gan: Gan | None,
    feature_matching: FeatureMatching | None,
    features: MatchedFeatures | None,
) -> Terms:
    """What the student descends afterwards."""
    terms: Terms = {}
    if distribution_matching is not None:
        terms["distribution_matching"] = DistributionMatchingTerm(distribution_matching, segmented)
    if segmented is not None and segmented.matches_features:
        assert feature_matching is not None and features is not None
        terms["feature_matching"] = FeatureMatchingTerm(feature_matching, features)
    if gan is not None:
        terms["adversarial"] = gan.student_term
    return terms


def check_update_schedule(
    update_schedule: UpdateSchedule, has_fake_score: bool, has_pairs: bool, warmup: Terms, after: Terms
) -> None:
    """Raises ValueError unless every phase of the update_schedule has what it learns from."""
    distils = update_schedule.max_student_updates > update_schedule.warmup_updates
    if distils and not after:
        raise ValueError(
            "the student has no objective after the warm-up: set distribution_matching, or discriminator and adversarial, or "
            "update_schedule.max_student_updates to update_schedule.warmup_updates."
        )
    if distils and not has_fake_score:
        raise ValueError(
            f"update_schedule goes on after the warm-up ({update_schedule.warmup_updates} of {update_schedule.max_student_updates} updates) "
            "and fake_score is null: set it, or end with the warm-up."
        )
    if update_schedule.warmup_updates and not warmup:
        raise ValueError(
            f"update_schedule.warmup_updates is {update_schedule.warmup_updates} and the warm-up has no objective: set regression, or "
            "feature_matching and features, or warmup_updates to 0."
        )
    needs_pairs = update_schedule.warmup_updates > 0 or "feature_matching" in after
    if needs_pairs != has_pairs:
        raise ValueError(
            f"pairs are {'set' if has_pairs else 'null'}, but update_schedule.warmup_updates is {update_schedule.warmup_updates} and "
            f"segmented {'matches' if 'feature_matching' in after else 'does not match'} features: a warm-up or the segmented "
            "mode needs pairs, and nothing else reads them."
        )


def check_features(
    feature_matching: FeatureMatching | None,
    features: MatchedFeatures | None,
    segmented: SegmentedScoreDistillation | None,
    distribution_matching: DistributionMatching | None,
) -> None:
    """Raises ValueError unless feature matching and the segmented mode have their parts."""
    if (feature_matching is None) != (features is None):
        raise ValueError("feature_matching and features go together: set both, or both to null.")
    if segmented is None:
        return
    if distribution_matching is None:
        raise ValueError(
            "segmented restricts distribution_matching, which is null: set it, or segmented to null."
        )
    if segmented.matches_features and feature_matching is None:
        raise ValueError(
            "segmented needs feature_matching and features, unless lambda_start and lambda_end are both 0."
        )


def check_timesteps(adversarial: DiffusionAdversarial | None, denoising: Denoising) -> None:
    """Raises ValueError where the discriminator would read a denoising pass over other timesteps than its own."""
    if adversarial is None or adversarial.features != "fake_score":
        return
    if adversarial.timesteps != denoising.timesteps:
        raise ValueError(
            f"adversarial.timesteps ({adversarial.timesteps}) must equal denoising.timesteps ({denoising.timesteps}), "
            "because the discriminator reads the denoising pass."
        )


def check_f_divergence(
    distribution_matching: DistributionMatching | None,
    adversarial: DiffusionAdversarial | None,
) -> None:
    """Raises ValueError unless the discriminator can say the density ratio that f_divergence asks for."""
    if distribution_matching is None or distribution_matching.f_divergence is None:
        return
    if adversarial is None or adversarial.features != "fake_score":
        got = "null" if adversarial is None else f"features of the {adversarial.features}"
        raise ValueError(
            "distribution_matching.f_divergence reads the density ratio from a discriminator of noisy latents, so adversarial "
            f"must be set, on features of the fake_score, got {got}; change adversarial, or set f_divergence "
            "to null."
        )
    asked, known = distribution_matching.timesteps, adversarial.timesteps
    if asked.low < known.low or asked.high > known.high:
        raise ValueError(
            f"distribution_matching.f_divergence asks the discriminator at timesteps {asked.low} to {asked.high}, and it "
            f"learns at {known.low} to {known.high} only; widen adversarial.timesteps."
        )
