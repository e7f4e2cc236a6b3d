"""Families against the diffusers pipelines of the released kinds of bases: prompts, constants, networks, decoders."""

from __future__ import annotations

from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import AutoencoderTiny, DiffusionPipeline

from sdxs_lightning.families import Family
from sdxs_lightning.families.sd import StableDiffusion
from sdxs_lightning.families.sdxl import StableDiffusionXL
from tests.helpers.tiny import LATENT_SHAPE, RESOLUTION_PX, SDXL_POOLED_DIM
from tests.helpers.tiny_releases import save_release, tiny_decoder

LONG = "a small red circle left of a large blue square on a white background above the green star " * 5
CAPTIONS = ["a red circle", "", "photo of a Cat!", LONG]
SD, SDXL = ["sd15", "sd21-base", "sd21", "sdxs"], ["sdxl", "vega", "ssd-1b"]


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("releases")
    for name in SD + SDXL:
        save_release(name, root / name)
    return root


def pipeline_of(family: Family) -> DiffusionPipeline:
    pipeline = getattr(diffusers, family.pipeline_class).from_pretrained(family.folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("name", SD)
def test_sd_prompts_equal_the_pipeline(name: str, releases: Path) -> None:
    family = StableDiffusion(str(releases / name))
    pipeline = pipeline_of(family)
    assert pipeline.tokenizer.pad_token == ("<|endoftext|>" if name == "sd15" else "!")
    cond, uncond = pipeline.encode_prompt(CAPTIONS, "cpu", 1, True, clip_skip=None)
    found = family.encode_prompts(CAPTIONS)
    assert found.negative_prompt_embeds is not None
    assert torch.equal(found.prompt_embeds, cond) and torch.equal(found.negative_prompt_embeds, uncond)
    assert not torch.equal(cond[0], cond[3])


@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("name", SDXL[:1])
def test_sdxl_prompts_equal_the_pipeline(name: str, zeros: bool, releases: Path, tmp_path: Path) -> None:
    family = StableDiffusionXL(str(releases / name))
    pipeline = pipeline_of(family)
    if not zeros:
        pipeline.register_to_config(force_zeros_for_empty_prompt=False)
        pipeline.save_pretrained(tmp_path)
        family = StableDiffusionXL(str(tmp_path))
    cond, uncond, pooled, uncond_pooled = pipeline.encode_prompt(CAPTIONS, device="cpu", clip_skip=None)
    found = family.encode_prompts(CAPTIONS)
    assert found.negative_prompt_embeds is not None and found.negative_pooled_prompt_embeds is not None
    assert found.pooled_prompt_embeds is not None
    assert torch.equal(found.prompt_embeds, cond) and torch.equal(found.pooled_prompt_embeds, pooled)
    if zeros:
        assert torch.equal(found.negative_prompt_embeds, uncond)
        assert torch.equal(found.negative_pooled_prompt_embeds, uncond_pooled)
    # "" once instead of once per caption: another batch size, another rounding.
    torch.testing.assert_close(found.negative_prompt_embeds, uncond, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.negative_pooled_prompt_embeds, uncond_pooled, rtol=0, atol=1e-6)
    assert bool((uncond == 0).all()) == bool((uncond_pooled == 0).all()) == zeros


def test_sdxl_time_ids_are_those_of_the_samples_own_size_and_crop(releases: Path) -> None:
    family = StableDiffusionXL(str(releases / "sdxl"))
    pipeline = pipeline_of(family)
    sizes, crops = [(640, 480), (333, 1025)], [(0, 7), (19, 0)]
    expected = [
        pipeline._get_add_time_ids(
            size,
            crop,
            (RESOLUTION_PX, RESOLUTION_PX),
            torch.float32,
            text_encoder_projection_dim=SDXL_POOLED_DIM,
        )
        for size, crop in zip(sizes, crops, strict=True)
    ]
    found = family.encode_prompts(CAPTIONS[:2], torch.tensor(sizes), torch.tensor(crops))
    assert found.add_time_ids is not None and torch.equal(found.add_time_ids, torch.cat(expected))
    # In half precision too, where 1025 would become 1024.
    halved = family.to(dtype=torch.bfloat16).encode_prompts(
        CAPTIONS[:2], torch.tensor(sizes), torch.tensor(crops)
    )
    assert halved.add_time_ids is not None and torch.equal(halved.add_time_ids, torch.cat(expected))
    assert halved.prompt_embeds.dtype == torch.bfloat16


@pytest.mark.parametrize("name", SD + SDXL)
def test_constants_and_networks_equal_the_pipeline(name: str, releases: Path) -> None:
    kind = StableDiffusion if name in SD else StableDiffusionXL
    family = kind(str(releases / name))
    assert isinstance(family, Family)
    pipeline = pipeline_of(family)
    assert family.prediction_type == pipeline.scheduler.config.prediction_type
    assert family.prediction_type == ("v_prediction" if name == "sd21" else "epsilon")
    # Ours is rounded once from float64, theirs is a float32 product.
    abar = pipeline.scheduler.alphas_cumprod
    torch.testing.assert_close(family.schedule.alphas_cumprod, abar, rtol=2e-5, atol=0)
    assert family.resolution == (48 if name == "sd21" else RESOLUTION_PX)
    assert family.latent_shape(RESOLUTION_PX) == LATENT_SHAPE
    assert family.scaling_factor == {"sd15": 0.18215}.get(name, 0.5)
    plain = {key: value for key, value in pipeline.unet.config.items() if not key.startswith("_")}
    assert {key: family.unet_config[key] for key in plain} == plain
    unet = family.load_unet()
    assert unet.dtype == torch.float32 and not any(value.is_meta for value in unet.state_dict().values())
    assert _same(unet.state_dict(), pipeline.unet.state_dict())


@pytest.mark.parametrize("name", ["sd15", "sdxs"])
def test_decode_equals_the_pipelines_last_step(name: str, releases: Path) -> None:
    family = StableDiffusion(str(releases / name))
    pipeline = pipeline_of(family)
    latents = torch.randn(2, *LATENT_SHAPE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor, return_dict=False)[0]
    torch.testing.assert_close(family.decode(latents), expected, rtol=1e-5, atol=1e-5)
    assert isinstance(pipeline.vae, AutoencoderTiny) == (name == "sdxs")


@pytest.mark.parametrize("name", ["sd15", "sdxs", "sdxl"])
def test_encode_is_the_scaled_mean_of_the_kl_vae(name: str, releases: Path) -> None:
    kind = StableDiffusionXL if name == "sdxl" else StableDiffusion
    family = kind(str(releases / name))
    images = (
        torch.rand(2, 3, RESOLUTION_PX, RESOLUTION_PX, generator=torch.Generator().manual_seed(0)) * 2 - 1
    )
    vae = family.load_vae()
    with torch.no_grad():
        expected = vae.encode(images).latent_dist.mean * vae.config.scaling_factor
    latents = family.encode(images)
    torch.testing.assert_close(latents, expected, rtol=1e-6, atol=1e-6)
    assert latents.shape[1:] == LATENT_SHAPE and not latents.requires_grad


def test_a_base_with_a_tiny_vae_keeps_the_kl_conventions_of_latents(releases: Path, tmp_path: Path) -> None:
    family = StableDiffusion(str(releases / "sdxs"))
    vae = family.load_vae()
    assert type(vae).__name__ == "AutoencoderKL" and vae.config.scaling_factor == family.scaling_factor == 0.5
    pipeline = pipeline_of(family)
    pipeline.save_pretrained(tmp_path)  # without vae_large, which is no component
    alone = StableDiffusion(str(tmp_path))
    assert alone.scaling_factor == 0.18215 and alone.resolution == RESOLUTION_PX
    latents = torch.randn(1, *LATENT_SHAPE)
    assert torch.equal(alone.decode(latents), family.decode(latents))
    with pytest.raises(FileNotFoundError, match="has an AutoencoderTiny as vae and no vae_large"):
        alone.load_vae()


@pytest.mark.parametrize(("student", "base"), [("sdxs", "sd21-base"), ("vega", "sdxl"), ("ssd-1b", "sdxl")])
def test_released_students_load_beside_their_base(student: str, base: str, releases: Path) -> None:
    family = (StableDiffusion if base in SD else StableDiffusionXL)(str(releases / base))
    complete, alone = (
        family.load_unet(str(releases / student)),
        family.load_unet(str(releases / student / "unet")),
    )
    assert _same(complete.state_dict(), alone.state_dict())
    assert (complete.mid_block is None) == (student != "vega")
    latents, timesteps = torch.randn(2, *LATENT_SHAPE), torch.tensor([999, 399])
    with torch.no_grad():
        output = complete(latents, timesteps, **family.encode_prompts(CAPTIONS[:2]).unet_kwargs()).sample
    assert output.shape == latents.shape and output.isfinite().all()


def test_the_tiny_decoder_takes_scaled_latents_and_gives_signed_pixels() -> None:
    """What `decode` relies on: no scaling of its own, [-1, 1] although its last layer is trained in [0, 1]."""
    vae = tiny_decoder()
    assert vae.config.scaling_factor == 1.0
    latents = torch.randn(1, *LATENT_SHAPE)
    with torch.no_grad():
        clamped = torch.tanh(latents / 3) * 3
        assert torch.allclose(vae.decode(latents).sample, vae.decoder.layers(clamped) * 2 - 1, atol=1e-6)


def _same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
