"""The GAN path by itself: its logits, and which gradients it gives whom."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import softplus

from sdxs_lightning.modules.network import resting
from sdxs_lightning.modules.sample import Sample
from sdxs_lightning.modules.student_terms import AdversarialTerm
from sdxs_lightning.objectives.adversarial import DiffusionAdversarial
from sdxs_lightning.seeding import Stream
from sdxs_lightning.timesteps import TimestepRange
from tests.tiny import tiny_batch
from tests.training.tiny_distillation import (
    built,
    distillation,
    sample_of,
)

Base = Callable[[str], Path]


def test_student_gan_gradient_reaches_the_student_through_resting_judges(base: Base) -> None:
    module = built(distillation(base("sd-v_prediction")))
    sample = sample_of(module)
    with resting(module.fake_score, module.discriminator):
        loss, _ = AdversarialTerm(DiffusionAdversarial(student_weight=2.0))(sample, module.roles)
        loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in module.student.parameters())
    for judge in (module.fake_score, module.discriminator):
        assert judge is not None and all(p.grad is None and p.requires_grad for p in judge.parameters())
    with torch.no_grad():
        noisy = sample.renoise(
            module.family.schedule, TimestepRange(0, 999), Stream.GAN_TIMESTEP, Stream.GAN_NOISE
        )
        _, features = module.fake_score.predict_with_features(
            noisy.latents, noisy.timesteps, sample.conditioning
        )
        assert module.discriminator is not None
        logits = module.discriminator(features)
    torch.testing.assert_close(loss.detach(), 2 * softplus(-logits).mean())
    # Downhill for the student is uphill for its logits.
    with torch.no_grad():
        for parameter in module.student.parameters():
            assert parameter.grad is not None
            parameter.sub_(parameter.grad, alpha=5e-3)
    better, _ = AdversarialTerm(DiffusionAdversarial(student_weight=2.0))(sample_of(module), module.roles)
    assert better < loss


def test_critic_gan_gradient_trains_head_and_encoder_only(base: Base) -> None:
    module = built(distillation(base("sd-epsilon")))
    fake = sample_of(module).detach()
    data = tiny_batch(3)
    assert data.latents is not None and module.discriminator is not None
    real = Sample(latents=data.latents, conditioning=fake.conditioning, positions=data.positions, seed=0)
    noisy = fake.renoise(
        module.family.schedule, TimestepRange(0, 999), Stream.FAKE_TIMESTEP, Stream.FAKE_NOISE
    )
    _, features = module.fake_score.predict_with_features(noisy.latents, noisy.timesteps, fake.conditioning)
    module._adversarial_loss(features, real).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in module.discriminator.parameters())
    unet = module.fake_score.denoiser.unet
    for part in (unet.conv_in, unet.time_embedding, unet.down_blocks, unet.mid_block):
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in part.parameters())
    for part in (unet.up_blocks, unet.conv_out):
        assert all(p.grad is None for p in part.parameters())
    assert all(p.grad is None for p in module.student.parameters())
