"""Image to image by partial noise: a student of several timesteps in diffusers' own pipeline."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline

from sdxs_lightning.core.noise_schedule import add_noise
from sdxs_lightning.export import export_pipeline
from sdxs_lightning.families.sd import StableDiffusion
from sdxs_lightning.networks.backward_simulation import one_step
from sdxs_lightning.networks.student_generator import StudentGenerator
from tests.helpers.tiny import LATENT_SHAPE, save_tiny_sd

TIMESTEPS = [999, 749, 499, 249]
PROMPTS = ["a red circle", "a blue square"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[StudentGenerator, StableDiffusion, Path]:
    folder = tmp_path_factory.mktemp("student")
    family = StableDiffusion(str(save_tiny_sd(folder / "base")))
    student = StudentGenerator(partial(torch.optim.SGD, lr=0.1), timesteps=TIMESTEPS)
    student.build(family)
    unet = student.denoiser.unet
    export_pipeline(unet, family, folder / "pipeline", dtype=torch.float32, timesteps=student.timesteps)
    return student, family, folder / "pipeline"


@pytest.mark.parametrize("strength", [0.25, 0.5, 0.75, 1.0])
def test_a_strength_starts_at_the_timestep_of_its_share(
    exported: tuple[StudentGenerator, StableDiffusion, Path], strength: float
) -> None:
    student, family, folder = exported
    pipeline = StableDiffusionImg2ImgPipeline.from_pretrained(
        folder, use_safetensors=True, safety_checker=None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    source = torch.randn(2, *LATENT_SHAPE, generator=torch.Generator().manual_seed(1))
    drawn = pipeline(
        PROMPTS,
        image=source,  # latents, which the pipeline takes as they are
        strength=strength,
        num_inference_steps=len(TIMESTEPS),
        guidance_scale=0.0,
        generator=torch.Generator().manual_seed(2),
        output_type="latent",
    ).images

    generator = torch.Generator().manual_seed(2)
    conditioning = family.encode_prompts(PROMPTS)
    latents = source
    with torch.no_grad():
        for timestep in TIMESTEPS[len(TIMESTEPS) - round(len(TIMESTEPS) * strength) :]:
            noise = torch.randn(source.shape, generator=generator)
            timesteps = torch.full((2,), timestep)
            noisy = add_noise(latents, noise, timesteps, family.schedule)
            latents = one_step(student.denoiser, noisy, conditioning, timestep)
    torch.testing.assert_close(drawn, latents, rtol=0, atol=1e-4)
