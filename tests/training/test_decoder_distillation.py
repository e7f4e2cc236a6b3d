"""Stage `decoder`: conventions of both autoencoders, one step against plain torch, what learns when, resume, export."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor, nn
from torch.nn import functional as F

from sdxs_lightning.callbacks.export import Export
from sdxs_lightning.core.seeding import Stream, normal, uniform
from sdxs_lightning.export import export_pipeline
from sdxs_lightning.networks.denoiser import Denoiser
from sdxs_lightning.networks.projected_discriminator import ProjectedDiscriminator
from sdxs_lightning.networks.tiny_decoder import DecoderTopology, TinyDecoder, load_tiny
from sdxs_lightning.objectives.decoder_distillation import ProjectedAdversarial
from sdxs_lightning.pairs.target_sampler import TargetSampler
from sdxs_lightning.stages.decoder import DecoderDistillation
from tests.helpers.resumed_run import same
from tests.helpers.tiny import LATENT_SHAPE, tiny_batch
from tests.helpers.tiny_decoding import SAMPLER, SGD, TOPOLOGY, decoding, save_dinov2, save_tiny_autoencoder
from tests.helpers.tiny_distillation import family_of, fit, weights
from tests.training.resume.test_resume import Witness

Base = Callable[[str], Path]


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dinov2(tmp_path_factory.mktemp("features") / "dinov2")


def built(module: DecoderDistillation) -> DecoderDistillation:
    module.configure_model()
    return module


def random_latents(count: int = 2) -> Tensor:
    return torch.randn(count, *LATENT_SHAPE, generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------------------------------------- topology and conventions


def test_defaults_are_taesd() -> None:
    with torch.device("meta"):
        decoder = TinyDecoder(SGD)
        decoder.build(latent_channels=4, vae_factor=8)
        assert sum(parameter.numel() for parameter in decoder.parameters()) == 1_222_531
        assert decoder(torch.empty(1, 4, 64, 64)).shape == (1, 3, 512, 512)
        taesd = AutoencoderTiny().decoder
    assert {n: p.shape for n, p in decoder.decoder.named_parameters()} == {
        n: p.shape for n, p in taesd.named_parameters()
    }


def test_new_decoders_begin_grey_and_let_gradients_through() -> None:
    decoder = TinyDecoder(SGD, topology=DecoderTopology((16,) * 4, (3, 3, 3, 1)))
    decoder.build(latent_channels=4, vae_factor=8)
    images = decoder(random_latents())
    assert images.abs().mean() < 0.5
    layers: Any = decoder.decoder.layers
    hidden = layers[:-1](random_latents())
    assert 0.1 < hidden.std() < 10
    images.square().mean().backward()
    norms = [parameter.grad.norm().item() for parameter in decoder.parameters() if parameter.grad is not None]
    assert len(norms) == len(list(decoder.parameters())) and min(norms) > 0
    again = TinyDecoder(SGD, topology=DecoderTopology((16,) * 4, (3, 3, 3, 1)))
    again.build(latent_channels=4, vae_factor=8)
    same(dict(decoder.state_dict()), dict(again.state_dict()))


def test_tiny_decoder_is_autoencoder_tiny_on_scaled_latents(tmp_path: Path) -> None:
    folder = save_tiny_autoencoder(tmp_path / "tiny")
    stock = AutoencoderTiny.from_pretrained(folder)
    assert (stock.config.scaling_factor, stock.config.shift_factor) == (1.0, 0.0)
    decoder = TinyDecoder(SGD, base_weights=str(folder))
    decoder.build(latent_channels=4, vae_factor=2)
    latents = 4 * random_latents()
    images = decoder(latents)
    expected = stock.decode(
        latents / stock.config.scaling_factor
    ).sample  # what every diffusers pipeline calls
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-6)
    # Its last layers give [0, 1]; the class itself makes [-1, 1] of that and clamps no image.
    inner = stock.decoder.layers(3 * torch.tanh(latents / 3))
    torch.testing.assert_close(expected, 2 * inner - 1)
    with torch.no_grad():
        stock.decoder.layers[-1].bias.fill_(5.0)
    assert stock.decode(latents).sample.min() > 1


@pytest.mark.parametrize("kind", ["sd-epsilon", "sdxl-epsilon"])
def test_target_is_the_kl_decoder_on_the_same_latents(base: Base, kind: str) -> None:
    module, batch = built(decoding(base(kind))), tiny_batch(3)
    vae = AutoencoderKL.from_pretrained(base(kind) / "vae")
    assert vae.config.scaling_factor == 0.5 and not vae.config.shift_factor
    assert batch.latents is not None
    latents = module.pairs.latents(batch)
    assert torch.equal(latents, batch.latents * 0.5)  # shards hold the encoder's output, unscaled
    with torch.no_grad():
        expected = vae.decode(latents / vae.config.scaling_factor).sample  # as pipelines do
    target = module.pairs.decode_by_vae(3 * latents)
    torch.testing.assert_close(module.pairs.decode_by_vae(latents), expected.clamp(-1, 1), rtol=0, atol=1e-5)
    assert target.shape == (3, 3, 32, 32) and target.abs().max() <= 1 and not target.requires_grad
    assert module.pairs.vae_factor == 2 and module.decoder(latents).shape == target.shape


def test_target_stays_float32_under_autocast(base: Base) -> None:
    module, latents = built(decoding(base("sd-epsilon"))), random_latents()
    with torch.autocast("cpu", torch.bfloat16):
        target = module.pairs.decode_by_vae(latents)
    assert torch.equal(target, module.pairs.decode_by_vae(latents))


@pytest.mark.parametrize("kind", ["sd-v_prediction", "sdxl-epsilon"])
def test_sampled_latents_are_the_target_samplers(base: Base, kind: str) -> None:
    module, batch = built(decoding(base(kind), sampler=SAMPLER)), tiny_batch(3, start=5)
    family = family_of(base(kind))
    denoiser = Denoiser(family.load_unet(), family.schedule, family.prediction_type)
    noise = normal(3, Stream.TEACHER_NOISE, batch.positions, LATENT_SHAPE)
    conditioning = family.encode_prompts(batch.captions, batch.original_sizes, batch.crops)
    expected = TargetSampler(denoiser, steps=2, guidance_scale=3.0)(noise, conditioning)
    torch.testing.assert_close(module.pairs.latents(batch), expected, rtol=1e-5, atol=1e-4)


# --------------------------------------------------------------------------------------------------------- one step


class ByHand:
    """The same step in plain torch: whole losses, one backward each, the weight from the last layer's parameters."""

    def __init__(self, module: DecoderDistillation, latents: Tensor, positions: Tensor) -> None:
        assert module.discriminator is not None and module._features is not None
        self.decoder = copy.deepcopy(module.decoder.decoder)
        self.discriminator = copy.deepcopy(module.discriminator)
        self.features = copy.deepcopy(module._features.module)
        target = module.pairs.decode_by_vae(latents)
        images = self.decoder(latents)
        coarse = F.avg_pool2d(images, 2) - F.avg_pool2d(target, 2)
        reconstruction = 2.0 * coarse.abs().mean() + 0.5 * (images - target).abs().mean()
        corners = (uniform(3, Stream.AUGMENTATION, positions, (2,)) * 9).long().tolist()

        def see(batch: Tensor) -> list[Tensor]:
            squares = [x[None, :, t : t + 24, u : u + 24] for x, (t, u) in zip(batch, corners, strict=True)]
            seen: list[Tensor] = self.features(torch.cat(squares))
            return seen

        fake = see(images)
        adversarial = -torch.stack([x.mean() for x in self.discriminator(fake)]).mean()
        last, _ = list(self.decoder.parameters())[-2:]  # the last weight and its bias
        norms = [
            torch.autograd.grad(loss, last, retain_graph=True)[0].norm()
            for loss in (reconstruction, adversarial)
        ]
        self.weight = 0.5 * norms[0] / norms[1]
        (reconstruction + self.weight.detach() * adversarial).backward()
        self.discriminator.zero_grad()

        real = [x.detach().requires_grad_() for x in see(target)]
        pairs = [x.chunk(2) for x in self.discriminator([torch.cat(p) for p in zip(real, fake, strict=True)])]
        hinge = torch.stack([F.relu(1 - r).mean() + F.relu(1 + f).mean() for r, f in pairs]).mean()
        slopes = [
            torch.autograd.grad(r.sum(), x, create_graph=True)[0]
            for (r, _), x in zip(pairs, real, strict=True)
        ]
        r1 = torch.stack([(s**2).sum(dim=(1, 2, 3)).mean() for s in slopes]).mean()
        self.discriminator.zero_grad()
        discriminator_loss = hinge + 0.1 * r1
        parameters = list(self.discriminator.parameters())
        self.discriminator_gradients = torch.autograd.grad(discriminator_loss, parameters)


def test_one_step_equals_plain_torch(base: Base, shards: Path, dinov2: Path) -> None:
    module = built(decoding(base("sd-epsilon"), dinov2, ema_decay=0.75))
    before = weights(module)
    batch = tiny_batch(4)
    assert batch.latents is not None and module.discriminator is not None
    hand = ByHand(module, batch.latents.half().float() * 0.5, batch.positions)  # as shards hold them
    fit(module, shards, batches=1, batch_size=4, shuffled=False)  # type: ignore[arg-type]
    for (name, start), parameter in zip(
        ((n, v) for n, v in before.items() if n.startswith("decoder.")),
        hand.decoder.parameters(),
        strict=True,
    ):
        assert parameter.grad is not None
        now = dict(module.named_parameters())[name]
        torch.testing.assert_close(now.detach(), start - 0.1 * parameter.grad, rtol=1e-5, atol=1e-6)
        averaged = dict(module.named_parameters())[name.replace("decoder.", "average.", 1)]
        torch.testing.assert_close(averaged, 0.75 * start + 0.25 * now.detach(), rtol=1e-5, atol=1e-6)
    heads = [(n, v) for n, v in before.items() if n.startswith("discriminator.")]
    for (name, start), gradient in zip(heads, hand.discriminator_gradients, strict=True):
        changed = dict(module.named_parameters())[name].detach()
        torch.testing.assert_close(changed, start - 0.1 * gradient, rtol=1e-5, atol=1e-6)


def test_accumulated_reconstruction_equals_one_large_batch(base: Base, shards: Path) -> None:
    whole, parts = (built(decoding(base("sd-epsilon"), accumulate_grad_batches=n)) for n in (1, 2))
    fit(whole, shards, batches=1, batch_size=8, shuffled=False)  # type: ignore[arg-type]
    fit(parts, shards, batches=2, batch_size=4, shuffled=False)  # type: ignore[arg-type]
    assert (whole.iterations, parts.iterations) == (1, 1)
    for one, other in zip(whole.decoder.parameters(), parts.decoder.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_who_learns_when(base: Base, shards: Path, dinov2: Path) -> None:
    gan = ProjectedAdversarial(l1_only_share=0.5)
    module = built(
        decoding(base("sd-epsilon"), dinov2, adversarial=gan, sampler=SAMPLER, max_student_updates=4)
    )
    assert module._features is not None and module.pairs.network is not None
    frozen = [module._features.module, module.pairs.network.module]
    before, frozen_before = weights(module), [weights(part) for part in frozen]

    def moved(role: str) -> float:
        now = weights(module)
        names = [name for name in before if name.startswith(f"{role}.")]
        return sum(not torch.equal(before[name], now[name]) for name in names) / len(names)

    trainer = fit(module, shards, batches=2)  # type: ignore[arg-type]
    assert (moved("decoder"), moved("average"), moved("discriminator")) == (1, 1, 0)
    assert "discriminator/loss" not in trainer.callback_metrics
    module = built(
        decoding(base("sd-epsilon"), dinov2, adversarial=gan, sampler=SAMPLER, max_student_updates=4)
    )
    before = weights(module)
    assert module._features is not None and module.pairs.network is not None
    frozen = [module._features.module, module.pairs.network.module]
    updates: list[str] = []
    apply_update = module.apply_update

    def note_and_apply(role: str) -> None:
        updates.append(role)
        apply_update(role)

    module.apply_update = note_and_apply  # type: ignore[method-assign]
    trainer = fit(module, shards, batches=50)  # type: ignore[arg-type]  # ends by itself
    assert updates == ["decoder"] * 3 + ["discriminator", "decoder", "discriminator"]
    assert (module.iterations, module.student_updates) == (4, 4)
    assert (moved("decoder"), moved("average"), moved("discriminator")) == (1, 1, 1)
    names = {"student/reconstruction_loss", "student/adversarial_loss", "student/adversarial_weight"}
    assert names | {"discriminator/loss", "discriminator/r1"} <= set(trainer.callback_metrics)
    for part, start in zip(frozen, frozen_before, strict=True):
        assert all(torch.equal(start[name], value) for name, value in weights(part).items())
        assert all(parameter.grad is None for parameter in part.parameters()) and not part.training
    assert all(parameter.grad is None for parameter in module.parameters())
    roles = {name.split(".")[0] for name in module.state_dict()}
    assert roles == {"decoder", "average", "discriminator"}  # no frozen network is in a checkpoint


def test_gan_gradient_is_the_set_fraction_at_the_last_layer(base: Base, dinov2: Path) -> None:
    module = built(decoding(base("sd-epsilon"), dinov2))
    gradients: list[Tensor] = []
    module.accumulate = lambda loss, roles, last=None: gradients.append(  # type: ignore[method-assign]
        torch.autograd.grad(loss, module.decoder.last_weight, retain_graph=True)[0]
    )
    latents, positions = random_latents(), torch.arange(2)
    images = module.decoder(latents)
    target = module.pairs.decode_by_vae(latents)
    reconstruction = module.reconstruction.loss(images, target, 2)
    (alone,) = torch.autograd.grad(reconstruction, module.decoder.last_weight, retain_graph=True)
    module._adversarial_backward(images, reconstruction, positions)
    assert (gradients[0] - alone).norm().item() == pytest.approx(0.5 * alone.norm().item(), rel=1e-4)


# ------------------------------------------------------------------------------------------------- resume and export


@pytest.mark.parametrize("cut", [2, 5])
def test_resumed_run_equals_the_uninterrupted_one(
    base: Base, shards: Path, dinov2: Path, tmp_path: Path, cut: int
) -> None:
    def module() -> DecoderDistillation:
        return decoding(
            base("sd-epsilon"),
            dinov2,
            optimizer=partial(torch.optim.AdamW, lr=1e-3),
            adversarial=ProjectedAdversarial(l1_only_share=0.5, crop_px=24),
            sampler=SAMPLER,
            max_student_updates=7,  # the GAN begins with the fifth
        )

    straight = module()
    trainer = fit(straight, shards, 7, callbacks=[Witness(tmp_path / "cut.ckpt", cut)])  # type: ignore[arg-type]
    trainer.save_checkpoint(tmp_path / "straight.ckpt")
    torch.manual_seed(12345)  # the global state must not matter
    resumed = module()
    trainer = fit(resumed, shards, 7, ckpt_path=str(tmp_path / "cut.ckpt"))  # type: ignore[arg-type]
    trainer.save_checkpoint(tmp_path / "resumed.ckpt")
    one, two = (torch.load(tmp_path / f"{n}.ckpt", weights_only=False) for n in ("straight", "resumed"))
    for part in ("state_dict", "optimizer_states", "iterations", "global_step", "epoch"):
        same(one[part], two[part], part)
    assert resumed.iterations == 7 and one["optimizer_states"][1]["state"]


def test_export_is_the_average_and_says_that_it_has_no_encoder(
    base: Base, shards: Path, tmp_path: Path
) -> None:
    module = built(decoding(base("sd-epsilon")))
    trainer = fit(module, shards, batches=2, default_root_dir=tmp_path)  # type: ignore[arg-type]
    Export(dtype="float32").on_train_end(trainer, module)
    exported = AutoencoderTiny.from_pretrained(tmp_path / "decoder")
    assert module.average is not None
    latents = random_latents()
    expected = module.average.decoder(latents)
    torch.testing.assert_close(exported.decode(latents).sample, expected, rtol=0, atol=1e-6)
    assert not torch.allclose(expected, module.decoder(latents))
    assert exported.encode(torch.zeros(1, 3, 32, 32)).latents.isnan().all()
    assert exported.encode(torch.zeros(1, 3, 32, 32)).latents.shape == (1, *LATENT_SHAPE)


def test_base_weights_keep_their_encoder(base: Base, tmp_path: Path) -> None:
    folder = save_tiny_autoencoder(tmp_path / "tiny", encoder_block_out_channels=(12, 12))
    stock = AutoencoderTiny.from_pretrained(folder)
    module = built(decoding(base("sd-epsilon"), decoder=TinyDecoder(SGD, base_weights=str(folder))))
    changed = {name: value + 1 for name, value in module.decoder.decoder.state_dict().items()}
    exported = module.decoder.autoencoder(changed)
    assert list(exported.config.encoder_block_out_channels) == [12, 12]
    same(dict(exported.encoder.state_dict()), dict(stock.encoder.state_dict()))
    same(dict(exported.decoder.state_dict()), changed)


@pytest.mark.parametrize("kind", ["sd-epsilon", "sdxl-epsilon"])
def test_pipeline_with_the_tiny_decoder(base: Base, tmp_path: Path, kind: str) -> None:
    tiny = save_tiny_autoencoder(tmp_path / "tiny")
    family = family_of(base(kind))
    folder = export_pipeline(family.load_unet(), family, tmp_path / "out", dtype=torch.float32, vae=str(tiny))
    pipeline = getattr(diffusers, family.pipeline_class).from_pretrained(folder)
    assert isinstance(pipeline.vae, AutoencoderTiny) and pipeline.vae_scale_factor == 2
    run = partial(pipeline, "a red circle", num_inference_steps=1, guidance_scale=0.0, width=32, height=32)
    latents = run(latents=random_latents(1), output_type="latent").images
    images = torch.from_numpy(run(latents=random_latents(1), output_type="np").images).permute(0, 3, 1, 2)
    decoder = TinyDecoder(SGD, base_weights=str(folder))  # a pipeline's folder is read too
    decoder.build(4, 2)
    expected = (decoder(latents) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(images, expected.detach(), rtol=1e-4, atol=1e-4)
    same(
        dict(AutoencoderKL.from_pretrained(folder / "vae_large").state_dict()),
        dict(family.load_vae().state_dict()),
    )


# ------------------------------------------------------------------------------------------------------- refusals


def test_parts_go_together(base: Base, dinov2: Path) -> None:
    with pytest.raises(ValueError, match="features, discriminator and adversarial go together"):
        decoding(base("sd-epsilon"), discriminator=ProjectedDiscriminator(SGD))
    for absent in ("discriminator", "adversarial"):
        with pytest.raises(ValueError, match="features, discriminator and adversarial go together"):
            decoding(base("sd-epsilon"), dinov2, **{absent: None})
    with pytest.raises(ValueError, match="max_student_updates must be 1 or more, got 0"):
        decoding(base("sd-epsilon"), max_student_updates=0)


def test_latents_of_the_data_are_needed_without_a_sampler(base: Base) -> None:
    module = built(decoding(base("sd-epsilon")))
    batch = tiny_batch(2)
    captions_only = type(batch)(
        captions=batch.captions, positions=batch.positions, sample_ids=batch.sample_ids
    )
    with pytest.raises(
        ValueError, match=r"learns on the batch's latents \(4 channels\) and got none; make latent"
    ):
        module.pairs.latents(captions_only)


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        (
            {"block_out_channels": (8, 8, 8)},
            r"got block_out_channels \[8, 8, 8\] and num_decoder_blocks \[1, 1\]",
        ),
        ({"block_out_channels": (8, 16)}, r"block_out_channels must be equal, got \[8, 16\]"),
    ],
)
def test_topology_is_checked(topology: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecoderTopology(**{"num_decoder_blocks": (1, 1)} | topology)


def test_decoder_has_to_fit_the_base(base: Base, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"maps 4 latent channels to images 8 times as large, and the base has 4 ch"
    ):
        built(decoding(base("sd-epsilon"), decoder=TinyDecoder(SGD)))
    with pytest.raises(ValueError, match="topology and base_weights exclude each other"):
        TinyDecoder(SGD, topology=TOPOLOGY, base_weights="models/taesd")
    with pytest.raises(
        FileNotFoundError, match=r"holds a AutoencoderKL and no AutoencoderTiny; give .* as vae"
    ):
        load_tiny(str(base("sd-epsilon") / "vae"), "vae")
    with pytest.raises(
        FileNotFoundError, match=r"holds neither config.json nor vae/config.json and no Autoencoder"
    ):
        load_tiny(str(tmp_path), "vae")
    wide = save_tiny_autoencoder(tmp_path / "wide", latent_channels=16)
    family = family_of(base("sd-epsilon"))
    with pytest.raises(ValueError, match=r"has 16 latent channels and factor 2, and the base .* has 4 and 2"):
        export_pipeline(family.load_unet(), family, tmp_path / "out", vae=str(wide))


def test_heads_are_the_same_on_every_rank() -> None:
    shapes = [(16, 4, 4), (12, 2, 2)]
    heads = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        heads.append(ProjectedDiscriminator(SGD, seed=7))
        heads[-1].build(shapes)
    same(dict(heads[0].state_dict()), dict(heads[1].state_dict()))
    logits = heads[0]([torch.randn(3, *shape) for shape in shapes])
    assert [part.shape for part in logits] == [(3, 16), (3, 4)]
    convolutions = [m for m in heads[0].modules() if isinstance(m, nn.Conv2d)]
    heads[0].eval()
    largest = [torch.linalg.svdvals(m.weight.flatten(1))[0].item() for m in convolutions]
    assert largest == pytest.approx([1.0] * 6, abs=0.15)  # spectral norm, after its first power iterations
