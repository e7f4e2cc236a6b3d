"""Families against the diffusers pipelines, and their refusals."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from sdxs_lightning.families import Family
from sdxs_lightning.families.sd import StableDiffusion
from sdxs_lightning.families.sdxl import StableDiffusionXL
from tests.tiny import LATENT_SHAPE, RESOLUTION_PX, save_tiny_sd, save_tiny_sdxl

CAPTIONS = ["a red circle", "", "a small green square above a large blue star on a white background"]


@pytest.fixture(scope="module")
def sd_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_sd(tmp_path_factory.mktemp("sd") / "base", "v_prediction")


@pytest.fixture(scope="module")
def sdxl_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_sdxl(tmp_path_factory.mktemp("sdxl") / "base")


def test_sd_prompts_and_constants_equal_the_pipeline(sd_base: Path) -> None:
    family = StableDiffusion(str(sd_base))
    pipeline = StableDiffusionPipeline.from_pretrained(sd_base)
    cond, uncond = pipeline.encode_prompt(CAPTIONS, "cpu", 1, True)
    found = family.encode_prompts(CAPTIONS)
    assert torch.equal(found.prompt_embeds, cond)
    assert found.negative_prompt_embeds is not None and torch.equal(found.negative_prompt_embeds, uncond)
    assert not found.prompt_embeds.requires_grad
    assert family.latent_shape() == LATENT_SHAPE and family.latent_shape(64) == (4, 32, 32)
    assert (family.resolution, family.conditioning_timestep) == (RESOLUTION_PX, 999)
    assert (family.prediction_type, family.scaling_factor) == ("v_prediction", 0.5)
    assert isinstance(family, Family)


def test_sdxl_prompts_sizes_and_zeros_equal_the_pipeline(sdxl_base: Path) -> None:
    family = StableDiffusionXL(str(sdxl_base))
    pipeline = StableDiffusionXLPipeline.from_pretrained(sdxl_base)
    cond, uncond, pooled, uncond_pooled = pipeline.encode_prompt(CAPTIONS, device="cpu")
    found = family.encode_prompts(CAPTIONS)
    assert found.negative_prompt_embeds is not None and found.negative_pooled_prompt_embeds is not None
    assert found.pooled_prompt_embeds is not None and found.add_time_ids is not None
    assert torch.equal(found.prompt_embeds, cond) and torch.equal(found.pooled_prompt_embeds, pooled)
    assert torch.equal(found.negative_prompt_embeds, uncond)
    assert torch.equal(found.negative_pooled_prompt_embeds, uncond_pooled) and uncond_pooled.abs().sum() == 0
    assert found.add_time_ids.tolist() == [[32, 32, 0, 0, 32, 32]] * 3
    sizes, crops = torch.tensor([[640, 480]] * 3), torch.tensor([[7, 9]] * 3)
    told = family.encode_prompts(CAPTIONS, sizes, crops).add_time_ids
    assert told is not None and told.tolist() == [[640, 480, 7, 9, 32, 32]] * 3
    assert family.conditioning_timestep == 399 and isinstance(family, Family)


def test_decode_equals_the_vae_and_dtype_is_the_text_encoders(sd_base: Path) -> None:
    family = StableDiffusion(str(sd_base)).to(dtype=torch.bfloat16)
    latents = torch.randn(2, *LATENT_SHAPE)
    with torch.no_grad():
        expected = family.load_vae().decode(latents / 0.5).sample
    torch.testing.assert_close(family.decode(latents), expected, rtol=1e-5, atol=1e-5)
    assert family.encode_prompts(["a"]).prompt_embeds.dtype == torch.bfloat16
    assert family.to(dtype=torch.float32).encode_prompts(["a"]).prompt_embeds.dtype == torch.float32


def test_unet_is_loaded_from_base_pipeline_or_unet_folder(sd_base: Path, sdxl_base: Path) -> None:
    family = StableDiffusion(str(sd_base))
    unets = [family.load_unet(), family.load_unet(str(sd_base)), family.load_unet(str(sd_base / "unet"))]
    for unet in unets:
        assert torch.equal(unet.conv_in.weight, unets[0].conv_in.weight) and unet.dtype == torch.float32
    assert unets[0] is not unets[1]
    with pytest.raises(ValueError, match=r"reads prompts of width 48, .* give 32"):
        family.load_unet(str(sdxl_base))
    with pytest.raises(FileNotFoundError, match="neither a U-Net folder"):
        family.load_unet(str(sd_base / "vae" / "nothing"))


def test_refusals_name_the_cause(sd_base: Path, sdxl_base: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder '.*absent'"):
        StableDiffusion(str(tmp_path / "absent"))
    with pytest.raises(FileNotFoundError, match=r"no model_index.json"):
        StableDiffusion(str(tmp_path))
    with pytest.raises(
        ValueError, match="holds a StableDiffusionXLPipeline, and this family needs a StableDiffusionP"
    ):
        StableDiffusion(str(sdxl_base))
    with pytest.raises(ValueError, match="choose the other family.class_path"):
        StableDiffusionXL(str(sd_base))
    with pytest.raises(ValueError, match=r"must be in \[0, 999\], got 1000"):
        StableDiffusion(str(sd_base), conditioning_timestep=1000)
    broken = tmp_path / "broken"
    shutil.copytree(sd_base, broken)
    shutil.rmtree(broken / "text_encoder")
    with pytest.raises(FileNotFoundError, match=r"lacks the component folder\(s\) text_encoder"):
        StableDiffusion(str(broken))
    (broken / "text_encoder").mkdir()
    (broken / "vae" / "config.json").write_text('{"scaling')
    with pytest.raises(ValueError, match=r"config.json' is not readable as JSON"):
        StableDiffusion(str(broken))
