"""The diffusion GAN by itself: its logits, which gradients it gives whom, and through whose features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from sdxs_lightning.core.seeding import Stream, normal
from sdxs_lightning.core.timesteps import TimestepRange
from sdxs_lightning.families import Family
from sdxs_lightning.networks.denoiser import Denoiser
from sdxs_lightning.networks.discriminator import Discriminator
from sdxs_lightning.networks.fake_score import FakeScore
from sdxs_lightning.networks.network import no_param_grad
from sdxs_lightning.networks.student_generator import StudentGenerator
from sdxs_lightning.objectives.adversarial import DiffusionAdversarial
from sdxs_lightning.objectives.term import DistillationContext, LatentSample
from sdxs_lightning.stages.distillation.gan import DiffusionGan, RealBatch
from tests.helpers.tiny import LATENT_SHAPE, tiny_batch
from tests.helpers.tiny_distillation import family_of

Base = Callable[[str], Path]
Features = Literal["fake_score", "real_score"]
SGD = partial(torch.optim.SGD, lr=0.1)
TIMESTEPS = TimestepRange(100, 900)


class Parts(NamedTuple):
    """Everything that a GAN meets."""

    family: Family
    student: StudentGenerator
    fake_score: FakeScore
    context: DistillationContext
    gan: DiffusionGan

    @property
    def head(self) -> Discriminator:
        return self.gan.discriminator

    def sample(self) -> LatentSample:
        """The student's sample for three prompts, with its graph."""
        batch = tiny_batch(3)
        noise = normal(0, Stream.STUDENT_NOISE, batch.positions, LATENT_SHAPE)
        conditioning = self.family.encode_prompts(batch.captions)
        latents = self.student(noise, conditioning)
        return LatentSample(latents=latents, conditioning=conditioning, positions=batch.positions, seed=0)

    def data(self) -> RealBatch:
        """A batch of three."""
        batch = tiny_batch(3)
        return RealBatch(batch, self.family.encode_prompts(batch.captions), seed=0)

    def denoiser(self, features: Features) -> Denoiser:
        """Whose features."""
        assert self.context.real_score is not None
        return self.context.real_score if features == "real_score" else self.fake_score.denoiser


def parts(base: Path, features: Features, **settings: Any) -> Parts:
    """Built networks of every role."""
    family = family_of(base)
    student, fake_score, discriminator = StudentGenerator(SGD), FakeScore(SGD), Discriminator(SGD)
    student.build(family)
    fake_score.build(family)
    unet = family.load_unet().requires_grad_(False)
    real_score = Denoiser(unet, family.schedule, family.prediction_type)
    with torch.no_grad():  # as after some training: no longer the real score
        fake_score.denoiser.unet.conv_in.weight.mul_(1.2)
    context = DistillationContext(family.schedule, fake_score, real_score, discriminator)
    objective = DiffusionAdversarial(timesteps=TIMESTEPS, features=features, **settings)
    gan = DiffusionGan(discriminator, objective)
    gan.build(family, context)
    return Parts(family, student, fake_score, context, gan)


def logits_by_hand(
    one: Parts, sample: LatentSample, features: Features, streams: tuple[Stream, Stream]
) -> Tensor:
    noisy = sample.renoise(one.family.schedule, TIMESTEPS, *streams)
    _, seen = one.denoiser(features).with_features(noisy.latents, noisy.timesteps, sample.conditioning)
    logits: Tensor = one.head(seen)
    return logits


def all_learn(*modules: nn.Module) -> bool:
    return all(p.grad is not None and p.grad.abs().max() > 0 for m in modules for p in m.parameters())


def none_learns(*modules: nn.Module) -> bool:
    return all(p.grad is None for m in modules for p in m.parameters())


@pytest.mark.parametrize("features", ["fake_score", "real_score"])
def test_student_gan_gradient_reaches_the_student_through_frozen_networks(
    base: Base, features: Features
) -> None:
    one = parts(base("sd-v_prediction"), features, student_weight=2.0)
    sample = one.sample()
    with no_param_grad(one.fake_score, one.head):
        loss, scalars = one.gan(sample, one.context)
        loss.backward()
    assert list(scalars) == ["adversarial"] and torch.equal(scalars["adversarial"], loss)
    assert all_learn(one.student) and none_learns(one.fake_score, one.head, one.denoiser("real_score"))
    assert all(p.requires_grad for network in (one.fake_score, one.head) for p in network.parameters())
    with torch.no_grad():
        logits = logits_by_hand(one, sample, features, (Stream.GAN_TIMESTEP, Stream.GAN_NOISE))
    torch.testing.assert_close(loss.detach(), 2 * softplus(-logits).mean())
    # Downhill for the student is uphill for its logits.
    with torch.no_grad():
        for parameter in one.student.parameters():
            assert parameter.grad is not None
            parameter.sub_(parameter.grad, alpha=5e-3)
    better, _ = one.gan(one.sample(), one.context)
    assert better < loss


@pytest.mark.parametrize("features", ["fake_score", "real_score"])
@pytest.mark.parametrize("kind", ["sd-epsilon", "sdxl-epsilon"])
def test_discriminator_loss_equals_a_computation_by_hand(base: Base, kind: str, features: Features) -> None:
    one = parts(base(kind), features, discriminator_weight=0.5)
    fake, data = one.sample().detach(), one.data()
    denoising_features = None
    if one.gan.reads_denoising_pass:
        noisy = fake.renoise(one.family.schedule, TIMESTEPS, Stream.FAKE_TIMESTEP, Stream.FAKE_NOISE)
        _, denoising_features = one.fake_score.predict_with_features(
            noisy.latents, noisy.timesteps, fake.conditioning
        )
    loss, scalars = one.gan.discriminator_loss(fake, data, one.context, denoising_features)
    assert data.batch.latents is not None
    real = replace(fake, latents=0.5 * data.batch.latents, conditioning=data.conditioning)  # its VAE's scale
    fakes = logits_by_hand(one, fake, features, (Stream.FAKE_TIMESTEP, Stream.FAKE_NOISE))
    reals = logits_by_hand(one, real, features, (Stream.REAL_TIMESTEP, Stream.REAL_NOISE))
    torch.testing.assert_close(loss, 0.5 * (softplus(fakes).mean() + softplus(-reals).mean()))
    right = ((fakes < 0).sum() + (reals > 0).sum()) / 6
    assert scalars["accuracy"].item() == pytest.approx(right.item()) and torch.equal(scalars["loss"], loss)


def test_the_discriminators_gradient_trains_head_and_encoder_only(base: Base) -> None:
    one = parts(base("sd-epsilon"), "fake_score")
    assert (one.gan.needs_real_score, one.gan.reads_denoising_pass) == (False, True)
    fake = one.sample().detach()
    noisy = fake.renoise(one.family.schedule, TIMESTEPS, Stream.FAKE_TIMESTEP, Stream.FAKE_NOISE)
    _, features = one.fake_score.predict_with_features(noisy.latents, noisy.timesteps, fake.conditioning)
    loss, _ = one.gan.discriminator_loss(fake, one.data(), one.context, features)
    loss.backward()
    unet = one.fake_score.denoiser.unet
    assert all_learn(one.head, unet.conv_in, unet.time_embedding, unet.down_blocks, unet.mid_block)
    assert none_learns(unet.up_blocks, unet.conv_out, one.student)


def test_through_the_real_score_the_head_alone_learns(base: Base) -> None:
    one = parts(base("sd-epsilon"), "real_score")
    assert (one.gan.needs_real_score, one.gan.reads_denoising_pass) == (True, False)
    loss, _ = one.gan.discriminator_loss(one.sample().detach(), one.data(), one.context, None)
    loss.backward()
    assert all_learn(one.head) and none_learns(one.fake_score, one.student, one.denoiser("real_score"))
    # A run that keeps its frozen networks in bfloat16 has a float32 head all the same.
    one.denoiser("real_score").bfloat16()
    rounded, _ = one.gan.discriminator_loss(one.sample().detach(), one.data(), one.context, None)
    assert rounded.dtype == torch.float32 and rounded.item() == pytest.approx(loss.item(), rel=0.05)


def test_latents_of_another_size_are_refused(base: Base) -> None:
    one = parts(base("sd-epsilon"), "real_score")
    data, sample = one.data(), one.sample().detach()
    for latents, message in (
        (torch.zeros(3, 4, 8, 8), r"latents of shape \(4, 16, 16\) in every batch and got shape \(4, 8, 8\)"),
        (None, "got none; make latent shards"),
    ):
        changed = data._replace(batch=replace(data.batch, latents=latents))
        with pytest.raises(ValueError, match=message):
            one.gan.discriminator_loss(sample, changed, one.context, None)
