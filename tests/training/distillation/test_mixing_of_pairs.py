"""Pairs beside samples from prompts and noise of their own, after the warm-up (DMD, arXiv:2311.18828, algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sdxs_lightning.core.pair_noise import pair_noise
from sdxs_lightning.core.seeding import Stream, normal
from sdxs_lightning.memory_plan.planner import Planner
from sdxs_lightning.networks.guidance_input import GuidanceInput
from sdxs_lightning.networks.student_generator import StudentGenerator
from sdxs_lightning.objectives.regression import Regression
from sdxs_lightning.objectives.term import DistillationContext, LatentSample, Scalars, StudentTerm
from sdxs_lightning.pairs.target_pairs import PairSettings
from sdxs_lightning.stages.distillation.pair_checks import check_mixing_of_pairs
from sdxs_lightning.stages.distillation.step import OneStepDistillation
from sdxs_lightning.stages.distillation.update_schedule import UpdateSchedule
from tests.helpers.planned import hardware
from tests.helpers.tiny import LATENT_SHAPE, tiny_batch
from tests.helpers.tiny_distillation import KINDS, Captions, built, distillation, fit, sample_of

Base = Callable[[str], Path]
SGD = partial(torch.optim.SGD, lr=0.1)
ALWAYS = Regression(phase="always")
MIXED = PairSettings(count=8, every_nth_sample=2, sampler_steps=2, sampler_batch_size=4)
WARMED_UP = UpdateSchedule(max_student_updates=9, warmup_updates=1)


class Seen(StudentTerm):
    """Keeps the samples that it gets."""

    phase = "always"

    def __init__(self) -> None:
        self.samples: list[LatentSample] = []

    def __call__(self, sample: LatentSample, context: DistillationContext) -> tuple[Tensor, Scalars]:
        self.samples.append(sample)
        return sample.latents.mean(), {}


class SeenOfPairs(Seen):
    needs_pairs = True


def mixing(base: Path, pairs: PairSettings = MIXED, **settings: Any) -> OneStepDistillation:
    settings.setdefault("regression", ALWAYS)
    settings.setdefault("update_schedule", WARMED_UP)
    return distillation(base, gan=False, pairs=pairs, **settings)


@pytest.mark.parametrize("kind", KINDS)
def test_every_second_sample_is_a_pair_after_the_warm_up(base: Base, kind: str) -> None:
    module = built(mixing(base(kind)))
    assert module.pairs is not None and module.real_score is not None
    module.pairs.start(module.real_score.module, Captions())
    batch = tiny_batch(4)
    noise, conditioning, target = module._inputs(batch, module.terms.distillation)
    pairs = module.pairs.pick(batch[::2])
    own = normal(0, Stream.STUDENT_NOISE, batch.positions, LATENT_SHAPE)
    prompts = module.family.encode_prompts(batch.captions)
    assert target is not None and torch.equal(target, pairs.target) and len(target) == 2
    assert torch.equal(noise[::2], pairs.noise) and torch.equal(noise[1::2], own[1::2])
    for name in ("prompt_embeds", "pooled_prompt_embeds", "negative_prompt_embeds", "add_time_ids"):
        mixed, of_pair, fresh = (getattr(one, name) for one in (conditioning, pairs.conditioning, prompts))
        if mixed is not None:
            assert torch.equal(mixed[::2], of_pair) and torch.equal(mixed[1::2], fresh[1::2])
    in_warmup = module._inputs(batch, module.terms.warmup)
    assert in_warmup.target is not None and len(in_warmup.target) == 4
    assert torch.equal(in_warmup.noise, module.pairs.pick(batch).noise)


def test_stored_pairs_of_the_batch_are_mixed_too(base: Base) -> None:
    """Every second sample has its target's noise; the others have their own captions, and noise that belongs to no target."""
    module = built(mixing(base("sd-epsilon"), replace(MIXED, source="batch")))
    batch = replace(tiny_batch(4), pair_noise_seeds=torch.arange(4) + 70)
    assert batch.latents is not None
    noise, conditioning, target = module._inputs(batch, module.terms.distillation)
    own = normal(0, Stream.STUDENT_NOISE, batch.positions, LATENT_SHAPE)
    assert torch.equal(noise[::2], pair_noise(torch.tensor([70, 72]), LATENT_SHAPE))
    assert torch.equal(noise[1::2], own[1::2])
    assert target is not None and torch.equal(target, module.family.scale_latents(batch.latents[::2]))
    prompts = module.family.encode_prompts(batch.captions).prompt_embeds
    assert torch.equal(conditioning.prompt_embeds, prompts)


def test_terms_with_pairs_get_the_pairs_and_others_all(base: Base, shards: Path) -> None:
    every, of_pairs = Seen(), SeenOfPairs()
    module = built(mixing(base("sd-epsilon"), objectives={"every": every, "of_pairs": of_pairs}))
    fit(module, shards, batches=2, shuffled=False)
    assert [len(sample.latents) for sample in every.samples] == [4, 4]
    assert [len(sample.latents) for sample in of_pairs.samples] == [4, 2]
    whole, part = every.samples[1], of_pairs.samples[1]
    assert torch.equal(part.latents, whole.latents[::2]) and torch.equal(part.positions, whole.positions[::2])
    assert whole.target is not None and part.target is not None and torch.equal(part.target, whole.target)


@pytest.mark.parametrize("mixed", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("kept", [1, 2, 3, 4, 6, 12])
def test_every_nth_of_a_mixed_sample_keeps_its_pairs(base: Base, mixed: int, kept: int) -> None:
    """Row by row: the pairs among the rows that are kept, and their targets."""
    tags = torch.arange(12.0).view(12, 1, 1, 1).expand(12, *LATENT_SHAPE)
    module = built(distillation(base("sd-epsilon"), gan=False))
    conditioning = module.family.encode_prompts([""] * 12)
    sample = LatentSample(
        latents=tags,
        conditioning=conditioning,
        positions=torch.arange(12),
        seed=0,
        target=tags[::mixed],
        pairs_every_nth=mixed,
    ).every(kept)
    rows = list(range(0, 12, kept))
    pairs = [row for row in rows if row % mixed == 0]
    part = sample.of_pairs()
    assert sample.positions.tolist() == rows and part.positions.tolist() == pairs
    assert part.target is not None and torch.equal(part.target, part.latents)


def test_regression_beside_is_that_of_its_half(base: Base, shards: Path) -> None:
    """Its value, and no gradient at the samples from no pair."""
    module = built(mixing(base("sd-epsilon"), update_schedule=replace(WARMED_UP, warmup_updates=0)))
    assert module.pairs is not None and module.real_score is not None
    module.pairs.start(module.real_score.module, Captions())
    sample = module._sample(tiny_batch(4), module.terms.distillation)
    half = sample.of_pairs()
    assert half.target is not None
    loss, _ = ALWAYS(half, module.context)
    error = sample.latents.detach()[::2] - half.target
    assert float(loss.detach()) == pytest.approx(float(error.square().mean()), rel=1e-6)
    (gradient,) = torch.autograd.grad(loss, sample.latents)
    assert gradient[::2].abs().sum() > 0 and not gradient[1::2].any()


def test_what_mixing_does_not_go_with_is_refused(base: Base, shards: Path) -> None:
    with pytest.raises(ValueError, match="pairs.every_nth_sample must be 1 or more, got 0"):
        replace(MIXED, every_nth_sample=0)
    with pytest.raises(ValueError, match="is 2, but no objective after the warm-up needs pairs: set it to 1"):
        mixing(base("sd-epsilon"), regression=Regression())
    with pytest.raises(ValueError, match="is 2, but no objective after the warm-up needs pairs: set it to 1"):
        mixing(base("sd-epsilon"), update_schedule=UpdateSchedule(max_student_updates=1, warmup_updates=1))
    guided = StudentGenerator(SGD, guidance=GuidanceInput(low=1.0, high=3.0))
    with pytest.raises(
        ValueError, match=r"takes the guidance scale \(student.guidance\) too, which pairs have"
    ):
        mixing(base("sd-epsilon"), student=guided)
    starting = StudentGenerator(SGD, timesteps=[999, 499], image_starts=0.5)
    with pytest.raises(ValueError, match=r"takes images \(student.image_starts\) too"):
        mixing(base("sd-epsilon"), student=starting)
    with pytest.raises(ValueError, match=r"takes condition images \(stage controlnet\) too"):
        check_mixing_of_pairs(StudentGenerator(SGD), MIXED, reads_conditions=True, update_schedule=WARMED_UP)


@pytest.mark.parametrize("first", [{"warmup_updates": 5}, {"fake_score_only_iterations": 5}])
def test_a_batch_that_cannot_be_mixed_is_refused_in_the_first_iteration(
    base: Base, shards: Path, first: dict[str, int]
) -> None:
    schedule = UpdateSchedule(max_student_updates=9, **first)
    module = mixing(base("sd-epsilon"), replace(MIXED, every_nth_sample=3), update_schedule=schedule)
    with pytest.raises(
        ValueError, match=r"pairs.every_nth_sample \(3\) must divide the batch of a device, which has 4"
    ):
        fit(module, shards, batches=1)


def test_the_fake_score_does_not_learn_from_pairs_alone(base: Base) -> None:
    part = UpdateSchedule(
        max_student_updates=9, fake_score_updates_per_student_update=1, fake_score_every_nth_sample=2
    )
    with pytest.raises(
        ValueError,
        match=r"fake_score_every_nth_sample is 2, a multiple of pairs.every_nth_sample \(2\), and every iter",
    ):
        mixing(base("sd-epsilon"), update_schedule=part)
    mixing(base("sd-epsilon"), replace(MIXED, every_nth_sample=4), update_schedule=part)
    between = replace(
        part, fake_score_updates_per_student_update=2
    )  # between student updates it gets other samples
    mixing(base("sd-epsilon"), update_schedule=between)


def test_the_memory_plan_knows_batches_of_any_size(base: Base) -> None:
    module = mixing(base("sd-epsilon"), replace(MIXED, every_nth_sample=4))
    mixed = Planner(module, hardware(), 8).plan()
    plain = Planner(mixing(base("sd-epsilon"), replace(MIXED, every_nth_sample=1)), mixed.hardware, 8).plan()
    assert mixed.needed() == plain.needed()


def test_the_discriminators_real_half_has_the_batchs_own_prompts(base: Base, shards: Path) -> None:
    pairs = replace(MIXED, every_nth_sample=4)
    schedule = replace(WARMED_UP, warmup_updates=0, fake_score_every_nth_sample=2)
    module = built(distillation(base("sd-epsilon"), regression=ALWAYS, pairs=pairs, update_schedule=schedule))
    assert module.pairs is not None and module.real_score is not None
    module.pairs.start(module.real_score.module, Captions())
    batch = tiny_batch(8)
    fake, part = module._sample(batch, module.terms.distillation).every(2), schedule.for_fake_score(batch)
    prompts = module.family.encode_prompts(batch.captions).prompt_embeds[::2]
    assert torch.equal(module._real_batch(part, fake).conditioning.prompt_embeds, prompts)
    assert torch.equal(fake.conditioning.prompt_embeds[1::2], prompts[1::2])  # of no pair
    assert not torch.equal(fake.conditioning.prompt_embeds[::2], prompts[::2])
    fit(module, shards, batches=2)


def test_prompts_of_other_kinds_do_not_mix(base: Base) -> None:
    sample = sample_of(built(distillation(base("sd-epsilon"), gan=False))).conditioning
    with pytest.raises(
        ValueError, match="prompts with prompt_embeds cannot be mixed with prompts with prompt_"
    ):
        replace(sample, negative_prompt_embeds=None).with_every(2, sample[:2])
