"""Pairs whose targets have guidance scales and negative prompts of their own, for a student that learns what those do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sdxs_lightning.core.batch import Conditioning
from sdxs_lightning.core.seeding import Stream, normal
from sdxs_lightning.networks.guidance_input import GuidanceInput, add_guidance_input
from sdxs_lightning.networks.lora import LoRA
from sdxs_lightning.networks.student_generator import StudentGenerator
from sdxs_lightning.objectives.distribution_matching import DistributionMatching
from sdxs_lightning.objectives.regression import Regression
from sdxs_lightning.pairs.scheduler_sampler import SchedulerSampler
from sdxs_lightning.pairs.target_pairs import PairSettings
from sdxs_lightning.pairs.target_sampler import TargetSampler
from sdxs_lightning.stages.distillation.step import OneStepDistillation
from sdxs_lightning.stages.distillation.update_schedule import UpdateSchedule
from tests.helpers.tiny import LATENT_SHAPE, tiny_batch
from tests.helpers.tiny_distillation import Captions, built, distillation, fit, weights

Base = Callable[[str], Path]
SGD = partial(torch.optim.SGD, lr=0.1)
STEPS, COUNT = 2, 7
GUIDANCE = GuidanceInput(
    low=1.0,
    high=4.0,
    default=2.0,
    dimensions=16,
    negative_prompts=("a blue square", "a red"),
    negative_share=0.6,
)
DRAWN = PairSettings(count=COUNT, sampler_steps=STEPS, sampler_batch_size=4, guidance_scale=None)
WARMUP = UpdateSchedule(max_student_updates=2, warmup_updates=2)


def warm_up(base: Path, pairs: PairSettings = DRAWN, **settings: Any) -> OneStepDistillation:
    settings = {"student": StudentGenerator(SGD, guidance=GUIDANCE), "update_schedule": WARMUP} | settings
    parts: dict[str, Any] = {"fake_score": None, "distribution_matching": None, "gan": False}
    return distillation(base, pairs=pairs, regression=Regression(), **parts | settings)


def expected(module: OneStepDistillation, caption: str, position: int, noise: Tensor) -> Tensor:
    """Target of one pair, by a sampler of its scale, guided away from its negative prompt."""
    assert module.real_score is not None
    positions = torch.tensor([position])
    scale = float(GUIDANCE.draw(module.seed, positions))
    drawn, chosen = GUIDANCE.draw_negative_prompts(module.seed, positions)
    negative = module.family.encode_prompts([GUIDANCE.negative_prompts[int(drawn)]])
    conditioning = module.family.encode_prompts([caption])
    if bool(chosen):
        conditioning = replace(
            conditioning,
            negative_prompt_embeds=negative.prompt_embeds,
            negative_pooled_prompt_embeds=negative.pooled_prompt_embeds,
        )
    return TargetSampler(module.real_score.module, STEPS, scale)(noise, conditioning)


@pytest.mark.parametrize("name", ["sd-v_prediction", "sdxl-epsilon"])
def test_pairs_in_the_step_have_each_their_scale_and_negative_prompt(base: Base, name: str) -> None:
    module = built(warm_up(base(name), replace(DRAWN, source="on_the_fly")))
    assert module.pairs is not None and module.real_score is not None
    module.pairs.start(module.real_score.module, None)
    batch = tiny_batch(6)
    sample = module._sample(batch, module.terms.warmup)
    assert sample.target is not None and sample.conditioning.guidance_scales is not None
    assert torch.equal(sample.conditioning.guidance_scales, GUIDANCE.draw(module.seed, batch.positions))
    noise = normal(module.seed, Stream.STUDENT_NOISE, batch.positions, LATENT_SHAPE)
    for i, position in enumerate(batch.positions.tolist()):
        wanted = expected(module, batch.captions[i], position, noise[i : i + 1])
        torch.testing.assert_close(sample.target[i : i + 1], wanted, rtol=1e-4, atol=1e-4)
    check_shifts(module, sample.conditioning, batch.positions)


@pytest.mark.parametrize("name", ["sd-v_prediction", "sdxl-epsilon"])
def test_pairs_in_memory_have_each_their_scale_and_negative_prompt(base: Base, name: str) -> None:
    module = built(warm_up(base(name)))
    assert module.pairs is not None and module.real_score is not None
    module.pairs.start(module.real_score.module, Captions())
    stored = module.pairs._stored
    assert stored is not None and len(stored) == COUNT
    index, captions = torch.arange(COUNT), Captions().train_captions(COUNT)
    noise = normal(module.seed, Stream.PAIRS, index, LATENT_SHAPE)
    for i in range(COUNT):
        wanted = expected(module, captions[i % len(captions)], i, noise[i : i + 1])
        torch.testing.assert_close(stored.targets[i : i + 1], wanted, rtol=1e-4, atol=1e-4)
    # The student is told what made the target that it gets.
    picked = module.pairs.pick(tiny_batch(6))
    chosen = torch.tensor(
        [[bool((one == target).all()) for target in stored.targets] for one in picked.target]
    )
    assert chosen.sum(dim=1).tolist() == [1] * 6
    pairs = chosen.int().argmax(dim=1)
    assert picked.conditioning.guidance_scales is not None
    assert torch.equal(picked.conditioning.guidance_scales, GUIDANCE.draw(module.seed, pairs))
    check_shifts(module, picked.conditioning, pairs)


def check_shifts(module: OneStepDistillation, conditioning: Conditioning, positions: Tensor) -> None:
    """The student's shift is the unconditional encoding minus that of the drawn negative prompt, 0 without one."""
    drawn, chosen = GUIDANCE.draw_negative_prompts(module.seed, positions)
    texts = [
        GUIDANCE.negative_prompts[i] if own else "" for i, own in zip(drawn.tolist(), chosen, strict=True)
    ]
    assert 0 < sum(map(bool, texts)) < len(texts)
    none = module.family.encode_prompts(texts).unconditional().prompt_embeds
    against = torch.where(chosen[:, None, None], module.family.encode_prompts(texts).prompt_embeds, none)
    assert conditioning.negative_prompt_shift is not None
    torch.testing.assert_close(conditioning.negative_prompt_shift, none - against)


@pytest.mark.parametrize("name", ["sd-v_prediction", "sdxl-epsilon"])
def test_a_discriminator_sees_the_pairs_guidance_in_both_halves(base: Base, name: str) -> None:
    pairs, always = replace(DRAWN, source="on_the_fly"), Regression(phase="always")
    student, schedule = StudentGenerator(SGD, guidance=GUIDANCE), UpdateSchedule(max_student_updates=2)
    module = built(
        distillation(base(name), pairs=pairs, regression=always, student=student, update_schedule=schedule)
    )
    assert module.pairs is not None and module.real_score is not None
    module.pairs.start(module.real_score.module, None)
    batch = tiny_batch(6)
    fake = module._sample(batch, module.terms.distillation)
    real = module._real_batch(replace(batch, captions=["a green ring"] * 6), fake).conditioning
    assert torch.equal(real.prompt_embeds, module.family.encode_prompts(["a green ring"] * 6).prompt_embeds)
    taken = ["guidance_scales", "negative_prompt_shift"]
    taken += ["negative_pooled_prompt_shift"] if name.startswith("sdxl") else []
    for one in taken:
        assert torch.equal(getattr(real, one), getattr(fake.conditioning, one)), one


def test_a_scheduler_takes_each_samples_scale(base: Base) -> None:
    module = built(warm_up(base("sd-v_prediction")))
    assert module.real_score is not None
    sampler = SchedulerSampler(module.real_score.module, 3, 99.0, "DPMSolverMultistepScheduler")
    noise = torch.randn(3, *LATENT_SHAPE, generator=torch.Generator().manual_seed(0))
    conditioning = module.family.encode_prompts(["a red circle"] * 3)
    scales = torch.tensor([1.0, 2.0, 4.0])
    found = sampler(noise, replace(conditioning, guidance_scales=scales))
    for i, scale in enumerate(scales.tolist()):
        alone = SchedulerSampler(module.real_score.module, 3, scale, "DPMSolverMultistepScheduler")
        torch.testing.assert_close(
            found[i : i + 1], alone(noise[i : i + 1], conditioning[i : i + 1]), rtol=1e-4, atol=1e-4
        )


def test_a_warm_up_alone_learns_the_scales(base: Base, shards: Path) -> None:
    module = warm_up(base("sd-v_prediction"), replace(DRAWN, source="on_the_fly"))
    before = weights(built(module))
    fit(module, shards, batches=2)
    name = "student.denoiser.unet.time_embedding.cond_proj.weight"
    assert not torch.equal(weights(module)[name], before[name])


def test_what_does_not_go_together_is_refused(base: Base) -> None:
    with pytest.raises(
        ValueError, match=r"pairs of pairs.source 'batch' are ready: give the scale that they were"
    ):
        PairSettings(source="batch", guidance_scale=None)
    with pytest.raises(
        ValueError, match=r"student.guidance draws each pair's scale, and that is null too; give"
    ):
        warm_up(base("sd-v_prediction"), student=StudentGenerator(SGD))
    with pytest.raises(ValueError, match="or, for a student that is trained whole, set student.guidance"):
        warm_up(base("sd-v_prediction"), student=StudentGenerator(SGD, lora=LoRA(rank=2)))
    with pytest.raises(
        ValueError, match="student.guidance needs updates of the student at more than one scale"
    ):
        warm_up(base("sd-v_prediction"), replace(DRAWN, guidance_scale=2.0))
    later: dict[str, Any] = {
        "pairs": DRAWN,
        "student": StudentGenerator(SGD, guidance=GUIDANCE),
        "distribution_matching": DistributionMatching(guidance_scale=1.0),
        "update_schedule": UpdateSchedule(max_student_updates=2, warmup_updates=1),
    }
    with pytest.raises(ValueError, match="more than one scale, to the end of the run: pairs with scales of"):
        distillation(base("sd-v_prediction"), regression=Regression(), **later)
    distillation(base("sd-v_prediction"), regression=Regression(phase="always"), **later)
    module = built(warm_up(base("sd-v_prediction"), replace(DRAWN, source="on_the_fly")))
    assert module.pairs is not None and module.real_score is not None
    add_guidance_input(module.real_score.module.unet, 16)
    with pytest.raises(ValueError, match="the target sampler's network takes the guidance scale as an input"):
        module.pairs.start(module.real_score.module, None)
