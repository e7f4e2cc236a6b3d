"""Settings that change the work or the direction of an update: samples used again, alignment, guidance in parts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from lightning.pytorch import Callback, Trainer

from sdxs_lightning.callbacks.export import Export
from sdxs_lightning.core.errors import UserError
from sdxs_lightning.core.noise_schedule import target_of
from sdxs_lightning.core.seeding import Stream, integers, normal, uniform
from sdxs_lightning.core.timesteps import TimestepRange
from sdxs_lightning.networks.fake_score import FakeScore
from sdxs_lightning.networks.lora import LoRA, merged_weights
from sdxs_lightning.networks.student_generator import StudentGenerator
from sdxs_lightning.objectives.denoising import Denoising
from sdxs_lightning.objectives.distribution_matching import DistributionMatching
from sdxs_lightning.objectives.term import LatentSample, NoisyLatents
from sdxs_lightning.stages.distillation.step import OneStepDistillation
from sdxs_lightning.stages.distillation.update_schedule import UpdateSchedule
from tests.helpers.tiny import LATENT_SHAPE, tiny_batch, tiny_sd_unet
from tests.helpers.tiny_distillation import WARMUP, built, distillation, fit, sample_of, weights

Base = Callable[[str], Path]
SGD = partial(torch.optim.SGD, lr=0.1)


def reusing(ratio: int, uses: int) -> UpdateSchedule:
    return UpdateSchedule(
        max_student_updates=10**6,
        fake_score_updates_per_student_update=ratio,
        fake_score_updates_per_sample=uses,
    )


def test_a_sample_used_twice_draws_new_noise_and_timesteps(base: Base, shards: Path) -> None:
    """By hand: the second update starts where the first ended, on the same latents, at fresh noise of its own stream."""
    module = built(
        distillation(base("sd-epsilon"), gan=False, update_schedule=reusing(2, 2), gradient_clip_norm=None)
    )
    assert module.fake_score is not None
    student, fake = copy.deepcopy(module.student), copy.deepcopy(module.fake_score.denoiser)
    fit(module, shards, batches=1, shuffled=False)
    assert (module.iterations, module.student_updates) == (1, 1)

    batch = tiny_batch(4)
    conditioning = module.family.encode_prompts(batch.captions)
    with torch.no_grad():
        x = student(normal(0, Stream.STUDENT_NOISE, batch.positions, LATENT_SHAPE), conditioning)
    seen = []
    for seed in (0, 1 << 40):
        t = integers(seed, Stream.FAKE_TIMESTEP, batch.positions, 0, 1000)
        noise = normal(seed, Stream.FAKE_NOISE, batch.positions, LATENT_SHAPE)
        seen.append(t)
        schedule = module.family.schedule
        noisy = schedule.alpha_t(t) * x + schedule.sigma_t(t) * noise
        prediction = fake(noisy, t, conditioning)
        target = target_of("epsilon", x, noise, t, schedule)
        loss = (prediction.output - target).square().mean()
        gradients = torch.autograd.grad(loss, list(fake.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(fake.parameters(), gradients, strict=True):
                parameter.sub_(gradient, alpha=0.1)
    assert not torch.equal(*seen)
    for found, wanted in zip(module.fake_score.denoiser.parameters(), fake.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_samples_used_again_count_as_iterations_of_one_student_pass(base: Base, shards: Path) -> None:
    """Ratio 4, each sample used twice: the student is updated on every second iteration, and passes once in each."""
    adam = partial(torch.optim.Adam, lr=1e-4)  # counts its steps
    module = built(
        distillation(
            base("sd-epsilon"), update_schedule=reusing(4, 2), accumulate_grad_batches=2, optimizer=adam
        )
    )
    assert module.fake_score is not None and module.discriminator is not None
    passes: list[int] = []
    module.student.denoiser.unet.register_forward_pre_hook(lambda m, inputs: passes.append(len(inputs[0])))
    trainer = fit(module, shards, batches=8, batch_size=2)
    assert (module.iterations, module.student_updates) == (4, 2)
    assert passes == [2] * 8
    steps = [optimizer.state_dict()["state"][0]["step"] for optimizer in trainer.optimizers]
    assert steps == [2, 8, 8]
    assert not module._kept_samples


def test_two_micro_batches_used_twice_are_one_batch_used_twice(base: Base, shards: Path) -> None:
    """The later updates read every kept sample, each once."""
    found = []
    for batch_size, accumulated in ((4, 1), (2, 2)):
        torch.manual_seed(0)
        module = built(
            distillation(
                base("sd-epsilon"),
                gan=False,
                update_schedule=reusing(2, 2),
                accumulate_grad_batches=accumulated,
            )
        )
        assert module.fake_score is not None
        fit(module, shards, batches=accumulated, batch_size=batch_size, shuffled=False)
        found.append(weights(module.fake_score))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-6)


def test_the_fake_score_learns_from_every_second_sample(base: Base, shards: Path) -> None:
    """The student makes four samples for its own update, two between updates; the loss is that of positions 0 and 2."""
    schedule = UpdateSchedule(
        max_student_updates=9, fake_score_updates_per_student_update=2, fake_score_every_nth_sample=2
    )
    module = built(distillation(base("sd-epsilon"), gan=False, update_schedule=schedule))
    assert module.fake_score is not None
    student, fake = copy.deepcopy(module.student), copy.deepcopy(module.fake_score.denoiser)
    losses: list[float] = []
    passes: dict[str, list[int]] = {"student": [], "fake_score": []}
    for role, network in (("student", module.student), ("fake_score", module.fake_score)):
        network.denoiser.unet.register_forward_pre_hook(
            lambda m, inputs, role=role: passes[role].append(len(inputs[0]))
        )

    class Look(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
            losses.append(float(trainer.callback_metrics["fake_score/loss"]))

    fit(module, shards, batches=2, shuffled=False, callbacks=[Look()])
    assert passes == {"student": [4, 2], "fake_score": [4, 2, 2]}

    batch = schedule.for_fake_score(tiny_batch(4))
    assert batch.positions.tolist() == [0, 2]
    conditioning = module.family.encode_prompts(batch.captions)
    with torch.no_grad():
        x = student(normal(0, Stream.STUDENT_NOISE, batch.positions, LATENT_SHAPE), conditioning)
        sample = LatentSample(latents=x, conditioning=conditioning, positions=batch.positions, seed=0)
        t_range = module.denoising.timesteps
        noisy = sample.renoise(module.family.schedule, t_range, Stream.FAKE_TIMESTEP, Stream.FAKE_NOISE)
        output = fake(noisy.latents, noisy.timesteps, conditioning).output
    assert losses[0] == pytest.approx(float((output - noisy.noise).square().mean()), rel=1e-5)


def test_the_part_for_the_fake_score_has_to_divide_the_batch(base: Base, shards: Path) -> None:
    with pytest.raises(ValueError, match="fake_score_every_nth_sample must be 1 or more, got 0"):
        UpdateSchedule(max_student_updates=1, fake_score_every_nth_sample=0)
    for settings in ({}, WARMUP | {"gan": False}):  # in the first iteration, of a warm-up too
        warmup = 5 if settings else 0
        schedule = UpdateSchedule(max_student_updates=6, warmup_updates=warmup, fake_score_every_nth_sample=3)
        module = distillation(base("sd-epsilon"), update_schedule=schedule, **settings)
        with pytest.raises(ValueError, match=r"\(3\) must divide the batch of a device, which has 4 samples"):
            fit(module, shards, batches=1)


def test_reuse_has_to_divide_the_ratio() -> None:
    with pytest.raises(ValueError, match=r"must divide fake_score_updates_per_student_update \(5\), got 2"):
        reusing(5, 2)
    schedule = reusing(6, 3)
    assert [schedule.updates_at(index).student for index in range(5)] == [True, False, True, False, True]


@pytest.mark.parametrize("lora", [None, LoRA(rank=2)])
def test_alignment_moves_the_fake_score_by_its_share_after_a_student_update(
    base: Base, shards: Path, lora: LoRA | None
) -> None:
    """Its own updates are of size zero, so that the pull alone is seen; towards a student with its adapters merged."""
    schedule = UpdateSchedule(max_student_updates=9, fake_score_updates_per_student_update=1)
    still = partial(torch.optim.SGD, lr=0.0)
    module = built(
        distillation(
            base("sd-epsilon"),
            gan=False,
            update_schedule=schedule,
            student=StudentGenerator(SGD, lora=lora),
            fake_score=FakeScore(still, alignment=0.25),
        )
    )
    assert module.fake_score is not None
    before = weights(module.fake_score)
    fit(module, shards, batches=1)
    unet = module.student.denoiser.unet
    student = merged_weights(unet, unet.state_dict())
    for name, found in weights(module.fake_score).items():
        expected = 0.75 * before[name] + 0.25 * student[name.removeprefix("denoiser.unet.")]
        torch.testing.assert_close(found, expected)
        # Equal at the start, so the pull is visible wherever the student moved.
    assert any(not torch.equal(found, before[name]) for name, found in weights(module.fake_score).items())


def test_alignment_acts_in_the_warm_up_too(base: Base, shards: Path) -> None:
    """So the fake score begins the distillation as an average of the warm-up's students, not as the base."""
    warmup = UpdateSchedule(max_student_updates=9, warmup_updates=5)
    module = built(
        distillation(
            base("sd-epsilon"),
            **WARMUP | {"update_schedule": warmup, "gan": False},
            fake_score=FakeScore(SGD, alignment=0.25),
        )
    )
    assert module.fake_score is not None
    before = weights(module.fake_score)
    fit(module, shards, batches=1)
    student = module.student.denoiser.unet.state_dict()
    for name, found in weights(module.fake_score).items():
        expected = 0.75 * before[name] + 0.25 * student[name.removeprefix("denoiser.unet.")]
        torch.testing.assert_close(found, expected)
    assert any(not torch.equal(found, before[name]) for name, found in weights(module.fake_score).items())


def test_alignment_needs_equal_architectures(base: Base, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="set alignment to 0, or lora to null"):
        FakeScore(SGD, lora=LoRA(rank=2), alignment=0.1)
    with pytest.raises(ValueError, match=r"alignment must be in \[0, 1\), got 1"):
        FakeScore(SGD, alignment=1.0)
    config = {name: value for name, value in tiny_sd_unet().config.items() if name[0] != "_"}
    UNet2DConditionModel(**config | {"mid_block_type": None}).save_pretrained(tmp_path)
    module = distillation(
        base("sd-epsilon"),
        student=StudentGenerator(SGD, weights=str(tmp_path)),
        fake_score=FakeScore(SGD, alignment=0.1),
    )
    with pytest.raises(ValueError, match="begin both from one U-Net: fake_score.weights as student.weights"):
        module.configure_model()
    both = distillation(
        base("sd-epsilon"),
        student=StudentGenerator(SGD, weights=str(tmp_path)),
        fake_score=FakeScore(SGD, weights=str(tmp_path), alignment=0.1),
    )
    assert built(both).fake_score is not None


def real_estimates(
    module: OneStepDistillation, **settings: object
) -> tuple[torch.Tensor, torch.Tensor, NoisyLatents]:
    objective = DistributionMatching(guidance_scale=3.0, **settings)  # type: ignore[arg-type]
    sample: LatentSample = sample_of(module).detach()
    noisy = sample.renoise(
        module.family.schedule, objective.timesteps, Stream.SCORE_TIMESTEP, Stream.SCORE_NOISE
    )
    guided, cond = objective._real_x0(noisy, sample, module.context)
    return guided, cond, noisy


@torch.no_grad()
def test_guidance_can_be_rescaled_and_confined_to_timesteps(base: Base) -> None:
    module = built(distillation(base("sd-v_prediction")))
    assert module.real_score is not None
    plain, cond, noisy = real_estimates(module)
    conditioning = sample_of(module).conditioning
    expected = module.real_score.module.guided(noisy.latents, noisy.timesteps, conditioning, 3.0).pred_x0
    torch.testing.assert_close(plain, expected, rtol=1e-4, atol=1e-4)

    whole, _, _ = real_estimates(module, guidance_rescale=1.0)
    torch.testing.assert_close(whole.std(dim=(1, 2, 3)), cond.std(dim=(1, 2, 3)))
    half, _, _ = real_estimates(module, guidance_rescale=0.5)
    torch.testing.assert_close(half, 0.5 * (plain + whole), rtol=1e-4, atol=1e-5)

    boundary = int(noisy.timesteps.sort().values[1])
    some, _, _ = real_estimates(module, guidance_timesteps=TimestepRange(boundary, 980))
    inside = noisy.timesteps >= boundary
    assert inside.tolist().count(False) == 1
    assert torch.equal(some[inside], plain[inside]) and torch.equal(some[~inside], cond[~inside])


def test_the_log_shows_both_parts_of_the_score_difference(base: Base, shards: Path) -> None:
    """At the start fake and real score are one network: the difference is guidance alone."""
    metrics = fit(distillation(base("sd-epsilon")), shards, batches=1).callback_metrics
    assert metrics["student/guidance_share"] == pytest.approx(1.0, abs=1e-4)
    assert abs(float(metrics["student/guidance_cosine"])) <= 1.001


def test_the_fake_score_is_exported_and_goes_on(base: Base, shards: Path, tmp_path: Path) -> None:
    module = built(distillation(base("sd-epsilon")))
    export = Export(str(tmp_path / "pipeline"), dtype="float32", fake_score=True)
    export.on_train_end(fit(module, shards, batches=2), module)
    assert module.fake_score is not None
    later = FakeScore(SGD, weights=str(tmp_path / "fake_score"))
    later.build(module.family)
    for found, wanted in zip(later.parameters(), module.fake_score.parameters(), strict=True):
        assert torch.equal(found, wanted)


def test_an_export_without_a_fake_score_is_refused(base: Base, shards: Path) -> None:
    module = distillation(base("sd-epsilon"))
    module.fake_score = None
    with pytest.raises(UserError, match="has no fake score; set it to false"):
        Export(fake_score=True).setup(None, module, "fit")  # type: ignore[arg-type]


def test_the_fake_score_can_be_guided_if_it_learns_without_prompts(base: Base, shards: Path) -> None:
    """Some of its training prompts are the unconditional ones, and the student's update asks it for both."""
    module = built(
        distillation(
            base("sd-epsilon"),
            gan=False,
            denoising=Denoising(caption_dropout=0.5),
            distribution_matching=DistributionMatching(guidance_scale=2.0, fake_guidance_scale=2.0),
        )
    )
    assert module.fake_score is not None
    seen: list[torch.Tensor] = []
    module.fake_score.denoiser.unet.register_forward_pre_hook(
        lambda m, inputs, kwargs: seen.append(kwargs["encoder_hidden_states"].detach()), with_kwargs=True
    )
    metrics = fit(module, shards, batches=1, batch_size=8, shuffled=False).callback_metrics
    student_turn, own_turn = seen
    unconditional = module.family.encode_prompts([""]).prompt_embeds[0]
    dropped = [torch.equal(prompt, unconditional) for prompt in own_turn]
    drawn = uniform(0, Stream.DROPOUT, torch.arange(8)) < 0.5
    assert dropped == drawn.tolist() and any(dropped) and not all(dropped)
    assert len(student_turn) == 16 and all(torch.equal(prompt, unconditional) for prompt in student_turn[:8])
    # Equal networks and equal guidance: nothing to match.
    assert float(metrics["student/distribution_matching"]) < 1e-9


def test_caption_dropout_is_refused_where_it_would_mislead(base: Base) -> None:
    with pytest.raises(ValueError, match=r"set denoising.caption_dropout, such as to 0.1"):
        distillation(base("sd-epsilon"), distribution_matching=DistributionMatching(fake_guidance_scale=2.0))
    with pytest.raises(ValueError, match="by their missing prompts: set adversarial.features to real_score"):
        distillation(base("sd-epsilon"), denoising=Denoising(caption_dropout=0.1))
    with pytest.raises(ValueError, match=r"caption_dropout must be in \[0, 1\), got 1"):
        Denoising(caption_dropout=1.0)
