"""The exported folder, run by stock diffusers."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import diffusers
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from safetensors import safe_open
from transformers import CLIPTokenizer

from sdxs_lightning.callbacks.export import Export
from sdxs_lightning.core.errors import UserError
from sdxs_lightning.core.noise_schedule import PredictionType
from sdxs_lightning.export import export_pipeline, one_step_scheduler
from sdxs_lightning.families.sd import StableDiffusion
from sdxs_lightning.families.sdxl import StableDiffusionXL
from sdxs_lightning.networks.student_generator import StudentGenerator
from tests.helpers.tiny import LATENT_SHAPE, save_tiny_sd, save_tiny_sdxl, tiny_sd_unet

CAPTIONS = ["a red circle", "a blue star on a white background"]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sdxl", [False, True], ids=["sd", "sdxl"])
def test_stock_pipeline_equals_the_student(
    tmp_path: Path, prediction_type: PredictionType, sdxl: bool
) -> None:
    save, family_class = (save_tiny_sdxl, StableDiffusionXL) if sdxl else (save_tiny_sd, StableDiffusion)
    base = save(tmp_path / "base", prediction_type)
    noise = torch.randn(2, *LATENT_SHAPE, generator=torch.Generator().manual_seed(1))
    for timestep in (999, 399):
        family = family_class(str(base), conditioning_timestep=timestep)
        student = StudentGenerator(partial(torch.optim.SGD, lr=0.1))
        student.build(family)
        with torch.no_grad():
            student.denoiser.unet.conv_out.weight.mul_(1.5)  # not the base's network
            latents = student(noise, family.encode_prompts(CAPTIONS))
            images = family.decode(latents)
        folder = export_pipeline(student.denoiser.unet, family, tmp_path / "out", dtype=torch.float32)
        pipeline = getattr(diffusers, family.pipeline_class).from_pretrained(folder)
        run = partial(
            pipeline, CAPTIONS, num_inference_steps=1, guidance_scale=0.0, latents=noise, width=32, height=32
        )
        size = float(latents.abs().max())
        torch.testing.assert_close(run(output_type="latent").images, latents, rtol=1e-5, atol=1e-5 * size)
        found = torch.from_numpy(run(output_type="np").images).permute(0, 3, 1, 2)
        torch.testing.assert_close(found, (images / 2 + 0.5).clamp(0, 1), rtol=1e-4, atol=1e-4)


def test_export_halves_files_and_leaves_the_student(tmp_path: Path) -> None:
    family = StableDiffusion(str(save_tiny_sd(tmp_path / "base")))
    unet = tiny_sd_unet(seed=4)
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.txt").write_text("from an earlier export")
    export_pipeline(unet, family, tmp_path / "out")
    assert not (tmp_path / "out" / "old.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]
    assert unet.dtype == torch.float32
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "out", torch_dtype=torch.float16)
    for name, value in pipeline.unet.state_dict().items():
        assert value.dtype == torch.float16 and torch.equal(value, before[name].half())
    half = (tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size
    complete = (tmp_path / "base" / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert half < 0.7 * complete


@pytest.mark.parametrize("sdxl", [False, True], ids=["sd", "sdxl"])
def test_earlier_transformers_find_what_they_read(tmp_path: Path, sdxl: bool) -> None:
    """Names of the published bases: before version 5, others mean a text encoder of random weights, and no tokenizer."""
    save, family_class = (save_tiny_sdxl, StableDiffusionXL) if sdxl else (save_tiny_sd, StableDiffusion)
    family = family_class(str(save(tmp_path / "base")))
    folder = export_pipeline(family.load_unet(), family, tmp_path / "out", dtype=torch.float32)
    for encoder in sorted(folder.glob("text_encoder*")):
        with safe_open(encoder / "model.safetensors", "pt") as file:
            names, metadata = list(file.keys()), file.metadata()
        assert {name.partition(".")[0] for name in names} <= {"text_model", "text_projection"}
        assert "text_model.embeddings.token_embedding.weight" in names and metadata == {"format": "pt"}
    for tokenizer in sorted(folder.glob("tokenizer*")):
        expected = CLIPTokenizer.from_pretrained(tokenizer)(CAPTIONS).input_ids
        assert {"vocab.json", "merges.txt"} <= {path.name for path in tokenizer.iterdir()}
        (tokenizer / "tokenizer.json").unlink()
        assert CLIPTokenizer.from_pretrained(tokenizer)(CAPTIONS).input_ids == expected
    again = family_class(str(folder), conditioning_timestep=family.conditioning_timestep)
    found, wanted = again.encode_prompts(CAPTIONS), family.encode_prompts(CAPTIONS)
    assert torch.equal(found.prompt_embeds, wanted.prompt_embeds)


def test_halved_files_run_without_naming_a_dtype(tmp_path: Path) -> None:
    """As the README's three lines do; transformers would load the text encoder in half precision."""
    family = StableDiffusion(str(save_tiny_sd(tmp_path / "base")))
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
        export_pipeline(tiny_sd_unet(), family, tmp_path / "out")
    )
    assert pipeline.text_encoder.dtype == pipeline.unet.dtype == pipeline.vae.dtype == torch.float32
    images = pipeline(CAPTIONS, num_inference_steps=1, guidance_scale=0.0, output_type="np").images
    assert images.shape == (len(CAPTIONS), 32, 32, 3)


def test_scheduler_lands_on_the_conditioning_timestep(tmp_path: Path) -> None:
    family = StableDiffusion(str(save_tiny_sd(tmp_path / "base")))
    for timestep in (999, 399, 0):
        scheduler = one_step_scheduler(family, timestep)
        scheduler.set_timesteps(1)
        assert scheduler.timesteps.tolist() == [timestep] and scheduler.init_noise_sigma == 1.0
        expected = family.schedule.alphas_cumprod[timestep]
        torch.testing.assert_close(scheduler.alphas_cumprod[timestep], expected, rtol=1e-5, atol=0)


def test_the_callback_refuses_a_stage_that_it_cannot_export() -> None:
    class Stage(LightningModule):
        pass

    class Decoder(LightningModule):
        export_name = "decoder"

        def write_export(self, folder: Path, average: bool, dtype: torch.dtype) -> None:
            raise AssertionError

    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    Export().setup(trainer, Decoder(), "fit")
    with pytest.raises(UserError, match="Stage has no write_export; remove the callback Export"):
        Export().setup(trainer, Stage(), "fit")
    with pytest.raises(UserError, match="Decoder exports a decoder, which has no VAE; set vae to null"):
        Export(vae="outputs/decoder").setup(trainer, Decoder(), "fit")
