"""The GAN on images by itself: both losses against plain torch, who learns, what is real, and its refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor
from torch.nn import functional as F

from sdxs_lightning.core.seeding import Stream, uniform
from sdxs_lightning.memory_plan.weightless import META, WeightlessFamily
from sdxs_lightning.networks.decoded_image_features import PixelDecoder
from sdxs_lightning.networks.image_features import Dinov2Features
from sdxs_lightning.networks.network import no_param_grad
from sdxs_lightning.networks.projected_discriminator import ProjectedDiscriminator
from sdxs_lightning.objectives.pixel_adversarial import Augmentation, PixelAdversarial
from sdxs_lightning.objectives.term import DistillationContext, LatentSample
from sdxs_lightning.stages.distillation.augmentation import augment
from sdxs_lightning.stages.distillation.gan import Gan, RealBatch
from sdxs_lightning.stages.distillation.pixel_gan import PixelGan
from tests.helpers.tiny import LATENT_SHAPE, tiny_batch, tiny_conditioning
from tests.helpers.tiny_decoding import save_dinov2, save_tiny_autoencoder
from tests.helpers.tiny_distillation import family_of

Base = Callable[[str], Path]
CROP_PX = 24
CASES = [("sd-v_prediction", False), ("sdxl-epsilon", True)]
"""Both kinds, one with the base's VAE and one with a tiny decoder."""


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dinov2(tmp_path_factory.mktemp("features") / "dinov2")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_autoencoder(tmp_path_factory.mktemp("tiny") / "vae")


def context_of(base: Path) -> DistillationContext:
    return DistillationContext(family_of(base).schedule, None, None, None)  # this GAN asks no other network


def gan_of(base: Path, dinov2: Path, **settings: Any) -> PixelGan:
    settings = {"student_weight": 2.0, "r1_weight": 0.1, "crop_px": CROP_PX} | settings
    heads = ProjectedDiscriminator(partial(torch.optim.SGD, lr=0.05))
    features = Dinov2Features(str(dinov2), layers=[0, 1], size_px=32)
    gan = PixelGan(heads, PixelAdversarial(**settings), features)
    gan.build(family_of(base), context_of(base))
    # Spectral normalisation iterates on every pass; after many it stands still, and passes can be compared.
    with torch.no_grad():
        for _ in range(200):
            heads([torch.zeros(1, 16, 2, 2)] * 2)
    return gan


def sample_of(base: Path, count: int = 3, seed: int = 2) -> LatentSample:
    latents = torch.randn(count, *LATENT_SHAPE, generator=torch.Generator().manual_seed(seed))
    conditioning = tiny_conditioning(count, sdxl=base.name.startswith("sdxl"))
    return LatentSample(
        latents=latents.requires_grad_(), conditioning=conditioning, positions=torch.arange(count), seed=3
    )


def data_of(base: Path, count: int = 3, **changes: Any) -> RealBatch:
    return RealBatch(replace(tiny_batch(count), **changes), sample_of(base, count).conditioning, seed=3)


def decode_by_hand(base: Path, latents: Tensor, tiny: Path | None) -> Tensor:
    """As pipelines do."""
    if tiny is not None:
        images: Tensor = AutoencoderTiny.from_pretrained(tiny).decode(latents).sample
    else:
        images = AutoencoderKL.from_pretrained(base / "vae").decode(latents / 0.5).sample
    return images


def see_by_hand(gan: PixelGan, images: Tensor, start: int = 0) -> list[Tensor]:
    numbers = uniform(3, Stream.AUGMENTATION, torch.arange(start, start + len(images)), (9,))
    corners = (numbers[:, :2] * (32 - CROP_PX + 1)).long().tolist()
    squares = [
        x[None, :, t : t + CROP_PX, u : u + CROP_PX] for x, (t, u) in zip(images, corners, strict=True)
    ]
    changed = augment(torch.cat(squares), numbers[:, 2:], Augmentation())
    features: list[Tensor] = gan.frozen_networks()["image_features"](changed)
    return features


@pytest.mark.parametrize(("kind", "is_tiny"), CASES)
def test_student_term_equals_plain_torch(
    base: Base, dinov2: Path, tiny: Path, kind: str, is_tiny: bool
) -> None:
    folder = tiny if is_tiny else None
    gan = gan_of(base(kind), dinov2, decoder=str(tiny) if is_tiny else None)
    sample = sample_of(base(kind))
    with no_param_grad(gan.discriminator):
        loss, scalars = gan(sample, context_of(base(kind)))
        (gradient,) = torch.autograd.grad(loss, sample.latents)
    logits = gan.discriminator(see_by_hand(gan, decode_by_hand(base(kind), sample.latents, folder)))
    expected = -2.0 * torch.stack([part.mean() for part in logits]).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    (by_hand,) = torch.autograd.grad(expected, sample.latents)
    torch.testing.assert_close(gradient, by_hand, rtol=1e-3, atol=1e-7)
    assert gradient.abs().amax(dim=(1, 2, 3)).min() > 0 and list(scalars) == ["adversarial"]
    # Downhill for the student is uphill for its logits.
    step = 0.05 * gradient / gradient.norm()
    better, _ = gan(replace(sample, latents=sample.latents - step), context_of(base(kind)))
    assert better < loss


@pytest.mark.parametrize(("kind", "is_tiny"), CASES)
def test_discriminator_loss_equals_plain_torch(
    base: Base, dinov2: Path, tiny: Path, kind: str, is_tiny: bool
) -> None:
    folder = tiny if is_tiny else None
    gan = gan_of(base(kind), dinov2, decoder=str(tiny) if is_tiny else None)
    sample, data = sample_of(base(kind)), data_of(base(kind))
    loss, scalars = gan.discriminator_loss(sample.detach(), data, context_of(base(kind)), None)
    parameters = list(gan.discriminator.parameters())
    gradients = torch.autograd.grad(loss, parameters)
    assert data.batch.latents is not None
    with torch.no_grad():
        fake = see_by_hand(gan, decode_by_hand(base(kind), sample.latents, folder))
        real = see_by_hand(gan, decode_by_hand(base(kind), 0.5 * data.batch.latents, folder))
    real = [part.requires_grad_() for part in real]
    reals, fakes = gan.discriminator(real), gan.discriminator(fake)
    hinge = torch.stack(
        [F.relu(1 - r).mean() + F.relu(1 + f).mean() for r, f in zip(reals, fakes, strict=True)]
    )
    slopes = [torch.autograd.grad(r.sum(), x, create_graph=True)[0] for r, x in zip(reals, real, strict=True)]
    r1 = torch.stack([(s**2).sum(dim=(1, 2, 3)).mean() for s in slopes]).mean()
    expected = hinge.mean() + 0.1 * r1
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    for found, by_hand in zip(gradients, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(found, by_hand, rtol=1e-3, atol=5e-5)
    assert scalars["loss"].item() == pytest.approx(hinge.mean().item(), rel=1e-4)
    assert scalars["r1"].item() == pytest.approx(r1.item(), rel=1e-3)


def test_a_sample_is_decoded_once_for_both_losses(
    base: Base, dinov2: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[int] = []
    decode = PixelDecoder.__call__

    def counted(self: PixelDecoder, latents: Tensor) -> Tensor:
        decoded.append(len(latents))
        return decode(self, latents)

    monkeypatch.setattr(PixelDecoder, "__call__", counted)
    folder, seen = base("sd-epsilon"), list[list[Tensor]]()
    gan = gan_of(folder, dinov2, decoder=str(tiny), r1_weight=None)
    data, context = data_of(folder), context_of(folder)
    gan.discriminator.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    sample, other = sample_of(folder), sample_of(folder, seed=5)
    gan(sample, context)
    gan.discriminator_loss(sample.detach(), data, context, None)
    assert len(decoded) == 2  # the sample and the data
    gan.discriminator_loss(sample.detach(), data, context, None)
    assert len(decoded) == 4  # what was seen is kept for one iteration
    gan(sample, context)
    gan.discriminator_loss(other.detach(), data, context, None)
    assert len(decoded) == 7
    _, reused, anew, _, of_other = seen
    for one, two, three in zip(reused, anew, of_other, strict=True):
        assert not one.requires_grad and torch.equal(one, two)
        assert not torch.equal(one.chunk(2)[1], three.chunk(2)[1])


def test_who_learns(base: Base, dinov2: Path, tiny: Path) -> None:
    gan: Gan = gan_of(base("sd-epsilon"), dinov2, decoder=str(tiny))
    assert isinstance(gan, PixelGan) and not (gan.needs_real_score or gan.reads_denoising_pass)
    networks = gan.frozen_networks()
    assert set(networks) == {"image_features", "pixel_decoder"}
    sample = sample_of(base("sd-epsilon"))
    gan.discriminator_loss(sample, data_of(base("sd-epsilon")), context_of(base("sd-epsilon")), None)[
        0
    ].backward()
    assert sample.latents.grad is None  # also where it had a graph
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in gan.discriminator.parameters())
    gan.discriminator.zero_grad()
    with no_param_grad(gan.discriminator):
        gan(sample, context_of(base("sd-epsilon")))[0].backward()
    assert sample.latents.grad is not None
    frozen = [p for network in (*networks.values(), gan.discriminator) for p in network.parameters()]
    assert all(p.grad is None for p in frozen) and not any(network.training for network in networks.values())
    heads = list(gan.discriminator.parameters())
    gan.build(family_of(base("sd-epsilon")), context_of(base("sd-epsilon")))  # a second call does nothing
    assert all(a is b for a, b in zip(heads, gan.discriminator.parameters(), strict=True))
    assert gan.frozen_networks() == networks


def test_real_and_fake_of_a_position_are_augmented_alike(base: Base, dinov2: Path) -> None:
    gan = gan_of(base("sd-epsilon"), dinov2, r1_weight=None)
    batch = tiny_batch(3)
    assert batch.latents is not None
    fake = replace(sample_of(base("sd-epsilon")), latents=0.5 * batch.latents)  # the data itself
    data = data_of(base("sd-epsilon"))
    seen: list[list[Tensor]] = []
    gan.discriminator.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    _, scalars = gan.discriminator_loss(fake, data, context_of(base("sd-epsilon")), None)
    for part in seen[0]:
        assert torch.equal(*part.chunk(2))
    assert set(scalars) == {"loss", "accuracy"} and scalars["accuracy"].item() == 0.5
    elsewhere = replace(fake, positions=torch.arange(10, 13))
    gan.discriminator_loss(elsewhere, data, context_of(base("sd-epsilon")), None)
    assert all(not torch.equal(*part.chunk(2)) for part in seen[1])
    assert all(torch.equal(a[:3], b[:3]) for a, b in zip(*seen, strict=True))


def test_images_can_be_real(base: Base, dinov2: Path) -> None:
    gan = gan_of(base("sd-epsilon"), dinov2, real="images", r1_weight=None, augmentation=None, crop_px=None)
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(4)) * 2 - 1
    seen: list[list[Tensor]] = []
    gan.discriminator.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    data = data_of(base("sd-epsilon"), images=images, latents=None)
    sample = sample_of(base("sd-epsilon")).detach()
    gan.discriminator_loss(sample, data, context_of(base("sd-epsilon")), None)
    with torch.no_grad():
        expected = gan.frozen_networks()["image_features"](images)
        fake = gan.frozen_networks()["image_features"](
            decode_by_hand(base("sd-epsilon"), sample.latents, None)
        )
    for part, one, other in zip(seen[0], expected, fake, strict=True):
        torch.testing.assert_close(part, torch.cat([one, other]), rtol=1e-4, atol=1e-5)


def test_heads_learn_to_tell_and_the_sample_to_pass(base: Base, dinov2: Path) -> None:
    """Both sides agree on which sign is real: what fools the trained heads is what the sample descends to."""
    gan, context = (
        gan_of(base("sd-epsilon"), dinov2, crop_px=None, r1_weight=None),
        context_of(base("sd-epsilon")),
    )
    sample = sample_of(base("sd-epsilon"))
    data = data_of(base("sd-epsilon"), latents=torch.full((3, 4, 16, 16), 4.0))
    heads = torch.optim.Adam(gan.discriminator.parameters(), lr=0.02)
    for _ in range(40):
        loss, scalars = gan.discriminator_loss(sample.detach(), data, context, None)
        heads.zero_grad()
        loss.backward()
        heads.step()
    assert loss < 1.2 and scalars["accuracy"] > 0.8
    descent = torch.optim.Adam([sample.latents], lr=0.1)
    for _ in range(20):
        loss, _ = gan(sample, context)
        (sample.latents.grad,) = torch.autograd.grad(loss, sample.latents)
        descent.step()
    _, fooled = gan.discriminator_loss(sample.detach(), data, context, None)
    assert fooled["accuracy"] < scalars["accuracy"] - 0.2


def test_images_stay_float32_under_autocast(base: Base, tiny: Path) -> None:
    latents = sample_of(base("sd-epsilon")).latents
    for folder in (None, str(tiny)):
        decoder = PixelDecoder(folder, "adversarial.decoder")
        decoder.build(family_of(base("sd-epsilon")))
        with torch.autocast("cpu", torch.bfloat16):
            images = decoder(latents)
        assert torch.equal(images, decoder(latents)) and images.requires_grad
    family = family_of(base("sd-epsilon"))
    assert torch.equal(family.decode(latents), family.decode_with_graph(latents))
    assert not family.decode(latents).requires_grad


@pytest.mark.parametrize("is_tiny", [False, True])
def test_memory_plan_runs_both_losses_without_weights(
    base: Base, dinov2: Path, tiny: Path, is_tiny: bool
) -> None:
    family = WeightlessFamily(family_of(base("sd-epsilon")))
    heads = ProjectedDiscriminator(partial(torch.optim.SGD, lr=0.1))
    settings = PixelAdversarial(crop_px=CROP_PX, decoder=str(tiny) if is_tiny else None)
    gan = PixelGan(heads, settings, Dinov2Features(str(dinov2), layers=[0, 1], size_px=32))
    with META:
        gan.build(family, context_of(base("sd-epsilon")))
    gan.to(META, torch.bfloat16)
    networks = gan.frozen_networks()
    assert all(p.is_meta for network in networks.values() for p in network.parameters())
    assert next(networks["image_features"].parameters()).dtype == torch.bfloat16
    positions = torch.empty(3, dtype=torch.int64, device=META)
    sample = replace(sample_of(base("sd-epsilon")), positions=positions)
    sample = replace(sample, latents=torch.empty(3, *LATENT_SHAPE, device=META, requires_grad=True))
    batch = data_of(
        base("sd-epsilon"), latents=torch.empty(3, *LATENT_SHAPE, device=META), positions=positions
    )
    loss, _ = gan(sample, context_of(base("sd-epsilon")))
    loss.backward()
    assert sample.latents.grad is not None and sample.latents.grad.is_meta
    gan.discriminator_loss(sample.detach(), batch, context_of(base("sd-epsilon")), None)[0].backward()
    assert family.decodes != is_tiny


def test_refusals(base: Base, dinov2: Path, tiny: Path, tmp_path: Path) -> None:
    folder = base("sd-epsilon")
    sample, context = sample_of(folder).detach(), context_of(folder)
    with pytest.raises(
        ValueError, match=r"latents of shape \(4, 16, 16\) .* got none; .* pixel_adversarial.real to images"
    ):
        gan_of(folder, dinov2).discriminator_loss(sample, data_of(folder, latents=None), context, None)
    with pytest.raises(ValueError, match=r"got shape \(4, 8, 8\)"):
        gan_of(folder, dinov2).discriminator_loss(
            sample, data_of(folder, latents=torch.zeros(3, 4, 8, 8)), context, None
        )
    gan = gan_of(folder, dinov2, real="images")
    with pytest.raises(
        ValueError, match=r"needs images of 32x32 pixels .* got none; let data.contents name images"
    ):
        gan.discriminator_loss(sample, data_of(folder), context, None)
    with pytest.raises(ValueError, match=r"got some of 16x32; let data.contents"):
        gan.discriminator_loss(sample, data_of(folder, images=torch.zeros(3, 3, 16, 32)), context, None)
    with pytest.raises(ValueError, match=r"crop_px of the GAN is 40 and the images are only 32x32"):
        gan_of(folder, dinov2, crop_px=40)(sample, context)
    with pytest.raises(
        FileNotFoundError, match="no AutoencoderTiny; give the folder of one as pixel_adversarial.decoder"
    ):
        gan_of(folder, dinov2, decoder=str(tmp_path))
    wide = save_tiny_autoencoder(tmp_path / "wide", latent_channels=16)
    with pytest.raises(
        ValueError, match=r"maps 16 latent channels to images 2 times as large, and the base has 4 ch"
    ):
        gan_of(folder, dinov2, decoder=str(wide))
