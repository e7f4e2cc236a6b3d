"""The tiny bases are what they claim: real, complete, loadable, and of the announced sizes."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from sdxs_lightning.core.noise_schedule import PredictionType
from tests.helpers import tiny


def test_sizes() -> None:
    for unet in (tiny.tiny_sd_unet(), tiny.tiny_sdxl_unet()):
        assert 50_000 <= sum(parameter.numel() for parameter in unet.parameters()) <= 70_000
        assert not unet.training


def test_seeds_decide_the_weights_and_nothing_else_changes() -> None:
    state = torch.get_rng_state()
    first, again, other = tiny.tiny_sd_unet(0), tiny.tiny_sd_unet(0), tiny.tiny_sd_unet(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.conv_in.weight, again.conv_in.weight)
    assert not torch.equal(first.conv_in.weight, other.conv_in.weight)


def test_the_tokenizer_knows_its_words_and_spells_the_others() -> None:
    tokenizer = tiny.tiny_tokenizer()
    ids = tokenizer("a small red circle left of a blue star").input_ids
    assert len(ids) == 9 + 2
    assert (
        tokenizer.decode(ids, skip_special_tokens=True).split()
        == "a small red circle left of a blue star".split()
    )
    assert tokenizer.unk_token_id not in tokenizer("zebra naïve 42!").input_ids[1:-1]
    assert tokenizer("", padding="max_length").input_ids[1:] == [tokenizer.eos_token_id] * 15
    assert tiny.tiny_tokenizer(pad_token="!")("", padding="max_length").input_ids[2:] == [0] * 14


@pytest.mark.parametrize("sdxl", [False, True])
def test_a_unet_listens_to_its_conditioning(sdxl: bool) -> None:
    unet = tiny.tiny_sdxl_unet() if sdxl else tiny.tiny_sd_unet()
    batch, conditioning = tiny.tiny_batch(2), tiny.tiny_conditioning(2, sdxl=sdxl)
    timesteps = torch.tensor([10, 900])
    with torch.no_grad():
        cond = unet(batch.latents, timesteps, **conditioning.unet_kwargs()).sample
        uncond = unet(batch.latents, timesteps, **conditioning.unconditional().unet_kwargs()).sample
    assert cond.shape == (2, *tiny.LATENT_SHAPE)
    assert (cond - uncond).abs().mean() > 1e-4


def test_a_sample_does_not_depend_on_its_batch() -> None:
    whole, part = tiny.tiny_batch(4), tiny.tiny_batch(2, start=2)
    assert whole.captions[2:] == part.captions
    assert whole.latents is not None
    assert part.latents is not None
    assert torch.equal(whole.latents[2:], part.latents)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_an_sd_base_runs_in_its_pipeline(tmp_path: Path, prediction_type: PredictionType) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny.save_tiny_sd(tmp_path / "base", prediction_type))
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.scheduler.config.prediction_type == prediction_type
    images = pipeline("a red circle", num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 32, 32, 3)
    assert torch.equal(pipeline.unet.conv_in.weight, tiny.tiny_sd_unet().conv_in.weight)


def test_an_sdxl_base_runs_in_its_pipeline(tmp_path: Path) -> None:
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny.save_tiny_sdxl(tmp_path / "base"))
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline("a red circle", num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 32, 32, 3)
    assert pipeline.tokenizer_2.pad_token == "!"
