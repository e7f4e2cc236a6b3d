"""Checks of a distillation's pairs against the stage, the student and the terms."""

from __future__ import annotations

from sdxs_lightning.networks.student_generator import StudentGenerator
from sdxs_lightning.pairs.target_pairs import PairSettings
from sdxs_lightning.stages.distillation.update_schedule import UpdateSchedule


def check_pairs(pairs: PairSettings | None, reads_conditions: bool, total: int) -> None:
    """Raises ValueError for pairs of the data without condition images, or more sampler steps than timesteps.

    Args:
        pairs: source and sampler.
        reads_conditions: whether the stage trains on condition images.
        total: number of timesteps of the base's noise schedule.
    """
    if pairs is not None and pairs.source == "data" and not reads_conditions:
        raise ValueError(
            "pairs.source is 'data', whose noise has nothing to do with its image: without condition images the student would "
            "learn the mean of all images. Take memory, batch or on_the_fly, or the stage controlnet."
        )
    if pairs is not None and pairs.samples and pairs.sampler_steps > total:
        raise ValueError(
            f"pairs.sampler_steps is {pairs.sampler_steps}, and the base has {total} timesteps; give at most so many."
        )


def check_guidance_of_pairs(student: StudentGenerator, pairs: PairSettings | None) -> None:
    """Raises ValueError if a student with the guidance scale as an input does not learn the pairs' scale, or there is none."""
    guidance = student.guidance
    if pairs is None or (guidance is None and pairs.guidance_scale is not None):
        return
    if guidance is None:
        raise ValueError(
            "pairs.guidance_scale is null, so that student.guidance draws each pair's scale, and that is null too; give "
            "pairs.guidance_scale a number of at least 1, or, for a student that is trained whole, set student.guidance."
        )
    if pairs.guidance_scale is not None and not guidance.low <= pairs.guidance_scale <= guidance.high:
        raise ValueError(
            f"pairs.guidance_scale is {pairs.guidance_scale}, outside the range of student.guidance ({guidance.low} to "
            f"{guidance.high}), at whose scale the student learns the pairs; change one of them."
        )


def check_mixing_of_pairs(
    student: StudentGenerator,
    pairs: PairSettings | None,
    reads_conditions: bool,
    update_schedule: UpdateSchedule,
) -> None:
    """Raises ValueError if pairs are mixed with other samples for a student that takes more than noise and prompts, or if the
    fake score would get those of pairs alone.
    """
    if pairs is None or pairs.every_nth_sample == 1:
        return
    takes = {
        "the guidance scale (student.guidance)": student.guidance is not None,
        "images (student.image_starts)": student.image_starts > 0,
        "condition images (stage controlnet)": reads_conditions,
    }
    for what, does in takes.items():
        if does:
            raise ValueError(
                f"pairs.every_nth_sample is {pairs.every_nth_sample}, which mixes samples from pairs with others, and the "
                f"student takes {what} too, which pairs have of their own: set it to 1."
            )
    learnt = update_schedule.fake_score_every_nth_sample
    if learnt % pairs.every_nth_sample == 0 and update_schedule.student_every == 1:
        raise ValueError(
            f"update_schedule.fake_score_every_nth_sample is {learnt}, a multiple of pairs.every_nth_sample "
            f"({pairs.every_nth_sample}), and every iteration updates the student, so the fake score would learn from pairs "
            "alone. Make pairs.every_nth_sample larger, or fake_score_every_nth_sample 1."
        )


def check_pairs_are_needed(
    pairs: PairSettings | None, in_warmup: bool, after_warmup: bool, warmup_updates: int
) -> None:
    """Raises ValueError for pairs that no term needs, or that are mixed with other samples where none does.

    Args:
        pairs: source and sampler.
        in_warmup: whether a term of the warm-up needs pairs.
        after_warmup: whether a term after it does.
        warmup_updates: student updates of the warm-up.
    """
    if pairs is None:
        return
    if pairs.every_nth_sample > 1 and not after_warmup:
        raise ValueError(
            f"pairs.every_nth_sample is {pairs.every_nth_sample}, but no objective after the warm-up needs pairs: set it to 1, "
            "or the phase of one that reads them (regression, feature_matching) to always or distillation."
        )
    if not in_warmup and not after_warmup:
        raise ValueError(
            f"pairs are set, but update_schedule.warmup_updates is {warmup_updates} and no objective after the warm-up needs "
            "pairs: set them to null, or an objective that reads them (regression, feature_matching) and its phase."
        )
