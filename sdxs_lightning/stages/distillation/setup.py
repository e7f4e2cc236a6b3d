"""Set-up of a one-step distillation: builds the student's loss terms and checks their requirements."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from sdxs_lightning.core.timesteps import TimestepRange
from sdxs_lightning.networks.discriminator import Discriminator
from sdxs_lightning.networks.fake_score import FakeScore
from sdxs_lightning.networks.image_features import ImageFeatures
from sdxs_lightning.networks.network import Network
from sdxs_lightning.networks.projected_discriminator import ProjectedDiscriminator
from sdxs_lightning.networks.student_generator import StudentGenerator
from sdxs_lightning.objectives.adversarial import DiffusionAdversarial
from sdxs_lightning.objectives.decoupled_guidance import DecoupledGuidance
from sdxs_lightning.objectives.denoising import Denoising
from sdxs_lightning.objectives.distribution_matching import DistributionMatching
from sdxs_lightning.objectives.feature_matching import FeatureMatching, FeatureMatchingTerm
from sdxs_lightning.objectives.matched_features import MatchedFeatures
from sdxs_lightning.objectives.pixel_adversarial import PixelAdversarial
from sdxs_lightning.objectives.regression import Regression
from sdxs_lightning.objectives.score_identity import ScoreIdentity
from sdxs_lightning.objectives.segmented_score_distillation import (
    BalancedFeatureMatching,
    SegmentedDistributionMatching,
    SegmentedScoreDistillation,
)
from sdxs_lightning.objectives.term import StudentTerm
from sdxs_lightning.pairs.target_pairs import PairSettings
from sdxs_lightning.stages.distillation.gan import DiffusionGan, Gan
from sdxs_lightning.stages.distillation.pair_checks import check_pairs_are_needed
from sdxs_lightning.stages.distillation.pixel_gan import PixelGan
from sdxs_lightning.stages.distillation.update_schedule import UpdateSchedule


class Terms(NamedTuple):
    """The student's loss terms by name, during and after the warm-up."""

    warmup: dict[str, StudentTerm]
    distillation: dict[str, StudentTerm]

    def of_run(self, update_schedule: UpdateSchedule) -> list[dict[str, StudentTerm]]:
        """The terms of each phase that the schedule has."""
        phases = [
            (update_schedule.warmup_updates > 0, self.warmup),
            (update_schedule.distils, self.distillation),
        ]
        return [terms for runs, terms in phases if runs]


def terms_of(
    distribution_matching: DistributionMatching | None,
    segmented: SegmentedScoreDistillation | None,
    regression: Regression | None,
    feature_matching: FeatureMatching | None,
    features: MatchedFeatures | None,
    gan: Gan | None,
    objectives: Mapping[str, StudentTerm | None] | None,
) -> Terms:
    """Builds the terms of a configuration, each in the phases that it declares.

    Raises:
        ValueError: if the arguments are inconsistent.
    """
    if (feature_matching is None) != (features is None):
        raise ValueError("feature_matching and features go together: set both, or both to null.")
    if segmented is not None and distribution_matching is None:
        raise ValueError(
            "segmented restricts distribution_matching, which is null: set it, or segmented to null."
        )
    if segmented is not None and feature_matching is not None and feature_matching.phase != "warmup":
        raise ValueError(
            f"feature_matching.phase is '{feature_matching.phase}', but segmented balances feature_matching after the warm-up "
            "itself: set feature_matching.phase to warmup, or segmented to null."
        )
    if segmented is not None and segmented.matches_features and feature_matching is None:
        raise ValueError(
            "segmented needs feature_matching and features, unless lambda_start and lambda_end are both 0."
        )

    def named() -> Iterator[tuple[str, StudentTerm]]:
        if distribution_matching is not None and segmented is None:
            yield "distribution_matching", distribution_matching
        elif distribution_matching is not None and segmented is not None:
            yield "distribution_matching", SegmentedDistributionMatching(distribution_matching, segmented)
        if regression is not None:
            yield "regression", regression
        if feature_matching is not None and features is not None:
            yield "feature_matching", FeatureMatchingTerm(feature_matching, features)
            if segmented is not None and segmented.matches_features:
                yield "feature_matching", BalancedFeatureMatching(feature_matching, features, segmented)
        if gan is not None:
            yield "adversarial", gan

    terms = Terms({}, {})
    for name, term in named():
        _add(terms, name, term)
    for name, extra in (objectives or {}).items():
        if extra is None:  # a later configuration file took it out
            continue
        if isinstance(extra, DecoupledGuidance):
            _check_guided_once(name, distribution_matching, objectives or {})
        if isinstance(extra, ScoreIdentity) and distribution_matching is not None:
            raise ValueError(
                f"objectives.{name} is in the place of the score difference, and distribution_matching is set too: set either "
                "to null."
            )
        if name in terms.warmup | terms.distillation:
            raise ValueError(
                f"objectives.{name} has the name of a built-in objective that is set; rename it, or set {name} to null."
            )
        _add(terms, name, extra)
    return terms


def _check_guided_once(
    name: str,
    distribution_matching: DistributionMatching | None,
    objectives: Mapping[str, StudentTerm | None],
) -> None:
    """Raises ValueError if a score difference guides the sample too, beside the DecoupledGuidance of this name."""
    differences: dict[str, StudentTerm | None] = {"distribution_matching": distribution_matching}
    differences |= {f"objectives.{one}": term for one, term in objectives.items()}
    for other, term in differences.items():
        if isinstance(term, DistributionMatching | ScoreIdentity) and term.guidance_scale != 1.0:
            raise ValueError(
                f"objectives.{name} is the guidance of the sample, and {other}.guidance_scale is {term.guidance_scale:g}, "
                f"which guides it a second time: set the latter to 1, or objectives.{name} to null."
            )


def _add(terms: Terms, name: str, term: StudentTerm) -> None:
    if term.phase not in ("warmup", "distillation", "always"):
        raise ValueError(
            f"phase of objective {name} is '{term.phase}', accepted are 'warmup', 'distillation' and 'always'."
        )
    if term.phase != "distillation":
        terms.warmup[name] = term
    if term.phase != "warmup":
        terms.distillation[name] = term


def gan_of(
    discriminator: Discriminator | ProjectedDiscriminator | None,
    adversarial: DiffusionAdversarial | None,
    pixel_adversarial: PixelAdversarial | None,
    image_features: ImageFeatures | None,
) -> Gan | None:
    """The GAN that a config's parts make; None where it names none.

    Raises:
        ValueError: if the arguments are inconsistent.
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


def check_timesteps(terms: Terms, denoising: Denoising | None, total: int) -> None:
    """Raises ValueError for timesteps that the base does not have or the fake score does not learn, and if none is guided.

    Args:
        terms: the student's loss terms.
        denoising: the fake score's loss; None without a fake score.
        total: number of timesteps of the base's noise schedule.
    """
    if denoising is not None:
        denoising.timesteps.check(total, "denoising.timesteps")
    for name, term in (terms.warmup | terms.distillation).items():
        objective = getattr(term, "objective", term)
        compared = getattr(objective, "timesteps", None)
        if not isinstance(compared, TimestepRange):
            continue
        compared.check(total, f"{name}.timesteps")
        by = ""
        if isinstance(term, SegmentedDistributionMatching):
            compared, by = term.widest(total), " at most, by segmented"
        learnt = denoising.timesteps if denoising is not None and term.needs_fake_score else None
        if learnt is not None and not learnt.low <= compared.low <= compared.high <= learnt.high:
            raise ValueError(
                f"{name}.timesteps are {compared.low} to {compared.high}{by}, and the fake score, which it reads there, "
                f"learns at denoising.timesteps {learnt.low} to {learnt.high} only; change one of them."
            )
        guided = objective.guidance_timesteps if isinstance(objective, DistributionMatching) else None
        if guided is not None and (guided.low > compared.high or guided.high < compared.low):
            raise ValueError(
                f"{name}.guidance_timesteps is {guided.low} to {guided.high}, and {name}.timesteps {compared.low} to "
                f"{compared.high}{by}, so that nothing is guided; let them overlap, or set guidance_scale to 1."
            )


def check_guidance_is_trained(
    student: StudentGenerator, terms: Terms, update_schedule: UpdateSchedule, pairs: PairSettings | None
) -> None:
    """Raises ValueError if a student with the guidance scale as an input learns one scale only, that of pairs, or none, or
    learns in the warm-up what the scale does and no longer afterwards.
    """
    if student.guidance is None:
        return
    drawn_pairs = pairs is not None and pairs.guidance_scale is None
    # Updates at drawn scales without guidance would make all of them alike again.
    last = terms.of_run(update_schedule)[-1]
    objectives = [getattr(term, "objective", term) for term in last.values()]
    guides = any(getattr(one, "guidance_scale", 1.0) != 1.0 for one in objectives)
    of_pairs = _need_pairs(last)
    if drawn_pairs if of_pairs else guides:
        return
    raise ValueError(
        "student.guidance needs updates of the student at more than one scale, to the end of the run: pairs with scales of "
        "their own (pairs.guidance_scale null; after a warm-up with regression.phase always), or updates without pairs in "
        "which the real score is guided, for which leave objectives with pairs to the warm-up (regression.phase) and give "
        "distribution_matching or an entry of objectives a guidance_scale above 1; or set student.guidance to null."
    )


def check_needs(
    terms: Terms,
    update_schedule: UpdateSchedule,
    pairs: PairSettings | None,
    fake_score: FakeScore | None,
    discriminator: Network | None,
) -> None:
    """Raises ValueError unless every phase has a term, and every term what it needs."""
    warmup_updates, last = update_schedule.warmup_updates, update_schedule.max_student_updates
    if update_schedule.distils and not terms.distillation:
        raise ValueError(
            "the student has no objective after the warm-up: set distribution_matching, or discriminator and adversarial, or "
            "an entry of objectives, or update_schedule.max_student_updates to update_schedule.warmup_updates."
        )
    if update_schedule.distils and fake_score is None:
        raise ValueError(
            f"update_schedule goes on after the warm-up ({warmup_updates} of {last} updates) and fake_score is null: set it, "
            "or end with the warm-up."
        )
    if warmup_updates and not terms.warmup:
        raise ValueError(
            f"update_schedule.warmup_updates is {warmup_updates} and the warm-up has no objective: set regression, or "
            "feature_matching and features, or an entry of objectives with phase warmup, or warmup_updates to 0."
        )
    phases = terms.of_run(update_schedule)
    provided = {
        "pairs": pairs is not None,
        "fake_score": fake_score is not None,
        "discriminator": isinstance(discriminator, Discriminator),
    }
    for phase in phases:
        for name, term in phase.items():
            for part, present in provided.items():
                if getattr(term, f"needs_{part}") and not present:
                    kind = (
                        " (a Discriminator of latents, with adversarial)" if part == "discriminator" else ""
                    )
                    raise ValueError(
                        f"objective {name} needs {part}: set model.init_args.{part}{kind}, or {name} to null."
                    )
            balance = term.balance(0.0)
            if balance is not None and balance.reference not in phase:
                raise ValueError(
                    f"objective {name} is balanced against {balance.reference}, which is not set in the same phase: set it, or "
                    f"{name} to null."
                )
    check_pairs_are_needed(
        pairs,
        in_warmup=warmup_updates > 0 and _need_pairs(terms.warmup),
        after_warmup=update_schedule.distils and _need_pairs(terms.distillation),
        warmup_updates=warmup_updates,
    )


def _need_pairs(terms: Mapping[str, StudentTerm]) -> bool:
    return any(term.needs_pairs for term in terms.values())
