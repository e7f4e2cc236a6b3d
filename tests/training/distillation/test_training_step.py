"""One iteration of the distillation: what moves, by how much, and which gradients exist."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn.functional import softplus

from sdxs_lightning.core.batch import Conditioning
from sdxs_lightning.core.seeding import Stream, integers, normal
from sdxs_lightning.networks.discriminator import Discriminator
from sdxs_lightning.networks.fake_score import FakeScore
from sdxs_lightning.networks.student_generator import StudentGenerator
from sdxs_lightning.objectives.distribution_matching import DistributionMatching
from sdxs_lightning.stages.distillation.step import OneStepDistillation
from sdxs_lightning.stages.distillation.update_schedule import UpdateSchedule
from sdxs_lightning.training.lr_schedules import TwoPhaseLR
from tests.helpers.tiny import LATENT_SHAPE, tiny_batch, tiny_sd_unet
from tests.helpers.tiny_distillation import (
    KINDS,
    WARMUP,
    WARMUP_ONLY,
    built,
    distillation,
    fit,
    moved,
    weights,
)

Base = Callable[[str], Path]
SGD = partial(torch.optim.SGD, lr=0.1)


FAKE_SCORE_ONLY = UpdateSchedule(max_student_updates=9, fake_score_only_iterations=9)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {"student": 1.0, "ema": 1.0, "fake_score": 1.0, "discriminator": 1.0}),
        ({"gan": False}, {"student": 1.0, "ema": 1.0, "fake_score": 1.0}),
        (
            {"distribution_matching": None},
            {"student": 1.0, "ema": 1.0, "fake_score": 1.0, "discriminator": 1.0},
        ),
        (
            {"update_schedule": FAKE_SCORE_ONLY},
            {"student": 0, "ema": 0, "fake_score": 1.0, "discriminator": 1.0},
        ),
        (
            {"update_schedule": WARMUP_ONLY, **WARMUP},
            {"student": 1.0, "ema": 1.0, "fake_score": 0, "discriminator": 0},
        ),
    ],
    ids=["both", "no-gan", "gan-only", "fake-score-iteration", "warmup-iteration"],
)
def test_which_networks_move(
    base: Base, shards: Path, settings: dict[str, Any], expected: dict[str, float]
) -> None:
    module = built(distillation(base("sd-v_prediction"), **settings))
    before = weights(module)
    real_before = weights(module.real_score.module) if module.real_score is not None else {}
    fit(module, shards, batches=1)
    # A bias before a normalisation may have a gradient below rounding, so one tensor in fifty may stay.
    assert {role: moved(before, module, role) for role in expected} == pytest.approx(expected, abs=0.02)
    assert (module.real_score is None) == (settings.get("distribution_matching", 0) is None)
    if module.real_score is not None:
        assert all(torch.equal(real_before[k], v) for k, v in weights(module.real_score.module).items())
        assert all(parameter.grad is None for parameter in module.real_score.module.parameters())
    assert all(parameter.grad is None for parameter in module.parameters())  # cleared, none left lying about


def head_of(module: OneStepDistillation) -> torch.nn.Module:
    """The head of the latents' discriminator."""
    assert isinstance(module.discriminator, Discriminator)
    return module.discriminator.head


class ByHand:
    """The same step in plain torch on raw U-Nets: no class of ours but the addresses of the noise."""

    def __init__(self, module: OneStepDistillation, size: int) -> None:
        batch = tiny_batch(size)
        assert batch.latents is not None and module.real_score is not None and module.fake_score is not None
        self.student, self.fake = module.student.denoiser.unet, module.fake_score.denoiser.unet
        self.real, self.head = module.real_score.module.unet, head_of(module)
        self.v = module.family.prediction_type == "v_prediction"
        self.timestep = module.family.conditioning_timestep
        self.conditioning = module.family.encode_prompts(batch.captions)
        self.positions = batch.positions
        self.data = batch.latents.half().float() * 0.5
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        self.abar = torch.cumprod(1 - betas, 0)

    def normal(self, stream: Stream) -> Tensor:
        return normal(0, stream, self.positions, LATENT_SHAPE)

    def at(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        abar = self.abar[timesteps].view(-1, 1, 1, 1)
        return abar.sqrt().float(), (1 - abar).sqrt().float()

    def call(
        self, unet: Any, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning | None = None
    ) -> Tensor:
        output: Tensor = unet(noisy, timesteps, **(conditioning or self.conditioning).unet_kwargs()).sample
        return output

    def x0(self, output: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
        alpha, sigma = self.at(timesteps)
        return alpha * noisy - sigma * output if self.v else (noisy - sigma * output) / alpha

    def features(self, noisy: Tensor, timesteps: Tensor) -> Tensor:
        kept: list[Tensor] = []
        handle = self.fake.mid_block.register_forward_hook(lambda module, inputs, output: kept.append(output))
        self.call(self.fake, noisy, timesteps)
        handle.remove()
        return kept[0]

    def losses(self) -> tuple[Tensor, Tensor]:
        """Student loss, and loss of fake score and discriminator, of the first iteration."""
        full = torch.full_like(self.positions, self.timestep)
        noise = self.normal(Stream.STUDENT_NOISE)
        x = self.x0(self.call(self.student, noise, full), noise, full)
        # Distribution matching, guidance 1.75.
        t = integers(0, Stream.SCORE_TIMESTEP, self.positions, 20, 981)
        alpha, sigma = self.at(t)
        with torch.no_grad():
            noisy = alpha * x + sigma * self.normal(Stream.SCORE_NOISE)
            fake = self.x0(self.call(self.fake, noisy, t), noisy, t)
            cond = self.x0(self.call(self.real, noisy, t), noisy, t)
            uncond = self.x0(self.call(self.real, noisy, t, self.conditioning.unconditional()), noisy, t)
            real = uncond + 1.75 * (cond - uncond)
            g = (fake - real) / (x - real).abs().mean((1, 2, 3), keepdim=True)
        student = 0.5 * ((x - (x - g).detach()) ** 2).mean()
        # GAN through the fake score.
        t = integers(0, Stream.GAN_TIMESTEP, self.positions, 0, 1000)
        alpha, sigma = self.at(t)
        noisy = alpha * x + sigma * self.normal(Stream.GAN_NOISE)
        student = student + 0.3 * softplus(-self.head(self.features(noisy, t)).flatten()).mean()
        # Fake score and discriminator on the detached sample and on data.
        x = x.detach()
        t = integers(0, Stream.FAKE_TIMESTEP, self.positions, 0, 1000)
        alpha, sigma = self.at(t)
        noise = self.normal(Stream.FAKE_NOISE)
        noisy = alpha * x + sigma * noise
        target = alpha * noise - sigma * x if self.v else noise
        others = ((self.call(self.fake, noisy, t) - target) ** 2).mean()
        others = others + 0.3 * softplus(self.head(self.features(noisy, t)).flatten()).mean()
        t = integers(0, Stream.REAL_TIMESTEP, self.positions, 0, 1000)
        alpha, sigma = self.at(t)
        noisy = alpha * self.data + sigma * self.normal(Stream.REAL_NOISE)
        others = others + 0.3 * softplus(-self.head(self.features(noisy, t)).flatten()).mean()
        return student, others


@pytest.mark.parametrize("kind", KINDS)
def test_an_iteration_equals_the_same_step_in_plain_torch(base: Base, shards: Path, kind: str) -> None:
    module = built(distillation(base(kind), gradient_clip_norm=None))
    assert module.fake_score is not None
    # Apart from the base, as after training: at the start fake equals real and the score difference is guidance alone.
    for parameter, other in zip(
        module.fake_score.parameters(), tiny_sd_unet(seed=3).parameters(), strict=False
    ):
        if parameter.shape == other.shape:
            parameter.data.lerp_(other.data, 0.1)
    hand = ByHand(copy.copy(module), size=4)
    student_loss, discriminator_loss = hand.losses()
    student = list(module.student.parameters())
    others = [*module.fake_score.parameters(), *module.discriminator.parameters()]  # type: ignore[union-attr]
    gradients = torch.autograd.grad(student_loss, student) + torch.autograd.grad(discriminator_loss, others)
    expected = [p.detach() - 0.1 * g for p, g in zip([*student, *others], gradients, strict=True)]
    trainer = fit(module, shards, batches=1, shuffled=False)
    for found, wanted in zip([*student, *others], expected, strict=True):
        torch.testing.assert_close(found.detach(), wanted, rtol=1e-5, atol=1e-6)
    metrics = trainer.callback_metrics
    logged = metrics["student/distribution_matching"] + metrics["student/adversarial"]
    torch.testing.assert_close(logged, student_loss.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["sd-epsilon", "sdxl-epsilon"])
def test_two_micro_batches_are_one_batch_of_twice_the_size(base: Base, shards: Path, kind: str) -> None:
    whole, parts = distillation(base(kind)), distillation(base(kind), accumulate_grad_batches=2)
    fit(whole, shards, batches=2, batch_size=4)
    fit(parts, shards, batches=4, batch_size=2)
    assert (whole.iterations, parts.iterations, parts.student_updates, parts.micro_batches) == (2, 2, 2, 0)
    for (name, one), (_, two) in zip(whole.named_parameters(), parts.named_parameters(), strict=True):
        assert float((one - two).detach().abs().max()) <= 1e-6, name


def test_average_follows_student_updates_only(base: Base, shards: Path) -> None:
    module = built(
        distillation(
            base("sd-epsilon"),
            update_schedule=UpdateSchedule(max_student_updates=99, fake_score_updates_per_student_update=2),
            ema_decay=0.75,
        )
    )
    history = [weights(module.student)]
    recorder = _AfterEachBatch(lambda: history.append(weights(module.student)))
    fit(module, shards, batches=4, callbacks=[recorder])  # updates on iterations 0 and 2
    assert module.student_updates == 2
    assert module.ema is not None and not module.ema.denoiser.training
    for name, averaged in weights(module.ema).items():
        start, first, second = (history[i][name] for i in (0, 1, 3))
        torch.testing.assert_close(averaged, 0.75 * (0.75 * start + 0.25 * first) + 0.25 * second)


class _AfterEachBatch(Callback):
    def __init__(self, function: Callable[[], None]) -> None:
        self.function = function

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.function()


def test_checkpoint_holds_what_learns_and_nothing_else(base: Base, shards: Path, tmp_path: Path) -> None:
    module = distillation(base("sdxl-epsilon"))
    trainer = fit(module, shards, batches=1)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    content = torch.load(tmp_path / "run.ckpt", weights_only=False)
    parts = {".".join(name.split(".")[:2]) for name in content["state_dict"]}
    assert parts == {"student.denoiser", "fake_score.denoiser", "ema.denoiser", "discriminator.head"}
    assert len(content["optimizer_states"]) == 3
    assert (content["iterations"], content["student_updates"]) == (1, 1)
    parameters = sum(value.numel() for value in content["state_dict"].values())
    unet = sum(parameter.numel() for parameter in module.family.load_unet().parameters())
    assert module.discriminator is not None
    head = sum(parameter.numel() for parameter in module.discriminator.parameters())
    assert parameters == 3 * unet + head


def test_guidance_one_asks_the_real_score_without_doubling(base: Base, shards: Path) -> None:
    sizes = {}
    for scale in (1.0, 3.0):
        module = built(
            distillation(base("sd-epsilon"), distribution_matching=DistributionMatching(guidance_scale=scale))
        )
        assert module.real_score is not None
        seen: list[int] = []
        module.real_score.module.unet.register_forward_pre_hook(
            lambda m, inputs, seen=seen: seen.append(len(inputs[0]))
        )
        trainer = fit(module, shards, batches=1)
        sizes[scale] = seen
        if scale == 1.0:  # fake score and real score are the same network here, so there is nothing to match
            assert trainer.callback_metrics["student/distribution_matching"] < 1e-9
    assert sizes == {1.0: [4], 3.0: [8]}


def test_run_ends_after_the_last_student_update(base: Base, shards: Path) -> None:
    update_schedule = UpdateSchedule(
        max_student_updates=2, fake_score_updates_per_student_update=3, fake_score_only_iterations=1
    )
    module = distillation(base("sd-epsilon"), update_schedule=update_schedule)
    fit(module, shards, batches=50)
    assert (module.student_updates, module.iterations) == (2, 5)


def test_learning_rates_move_with_each_networks_own_updates(base: Base, shards: Path) -> None:
    falling = partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda update: 0.5**update)
    module = distillation(
        base("sd-epsilon"),
        student=StudentGenerator(SGD, falling),
        fake_score=FakeScore(SGD, partial(TwoPhaseLR, total_updates=10, final_factor=0.0)),
        update_schedule=UpdateSchedule(max_student_updates=9, fake_score_updates_per_student_update=3),
    )
    trainer = fit(module, shards, batches=5)
    rates = [optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers]
    assert rates == pytest.approx([0.1 * 0.5**2, 0.05, 0.1])


@pytest.mark.parametrize(("batches", "steps"), [(3, [2, 1]), (4, [1, 2]), (5, [2, 3])])
def test_the_students_optimizer_begins_anew_after_the_warm_up(
    base: Base, shards: Path, batches: int, steps: list[int]
) -> None:
    """Steps that the moments of student and fake score remember: two of warm-up, one of the fake score alone, two of both."""
    module = distillation(
        base("sd-epsilon"),
        optimizer=partial(torch.optim.AdamW, lr=1e-3),
        update_schedule=UpdateSchedule(
            max_student_updates=9,
            warmup_updates=2,
            fake_score_only_iterations=1,
            fake_score_updates_per_student_update=1,
        ),
        **WARMUP,
    )
    trainer = fit(module, shards, batches=batches)
    states = [next(iter(optimizer.state.values())) for optimizer in trainer.optimizers[:2]]
    assert [int(state["step"]) for state in states] == steps
