"""The target sampler with schedulers of diffusers: against whole stock pipelines."""

from __future__ import annotations

import copy
import inspect
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor

from sdxs_lightning.core.noise_schedule import NoiseSchedule
from sdxs_lightning.core.seeding import Stream, normal
from sdxs_lightning.families import Family
from sdxs_lightning.families.detect import detect_family
from sdxs_lightning.networks.denoiser import Denoiser
from sdxs_lightning.pairs.ode_schedulers import ODE_SCHEDULERS
from sdxs_lightning.pairs.scheduler_sampler import SchedulerSampler
from sdxs_lightning.pairs.target_sampler import TargetSampler, make_sampler
from tests.helpers.tiny import LATENT_SHAPE, save_tiny_sd, save_tiny_sdxl, tiny_conditioning, tiny_sd_unet

# Of numpy's, inside diffusers.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

PROMPTS = ["a red circle", "a small blue square"]
NOISE = normal(3, Stream.PAIRS, torch.arange(2), LATENT_SHAPE)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {
        "sd": save_tiny_sd(folder / "sd"),
        "sd-v": save_tiny_sd(folder / "sd-v", "v_prediction"),
        "sdxl": save_tiny_sdxl(folder / "sdxl"),
    }


def by_the_pipeline(base: Path, scheduler: str, steps: int, guidance: float, **settings: Any) -> Tensor:
    """Latents of the stock pipeline of a base, with another scheduler."""
    kind = StableDiffusionXLPipeline if base.name == "sdxl" else StableDiffusionPipeline
    pipeline = copy.copy(_pipeline(kind, base))
    known = inspect.signature(getattr(diffusers, scheduler).__init__).parameters
    # As the configs of SD-1.5 have them; some classes default to something else.
    settings |= {"clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True}
    chosen = {name: value for name, value in settings.items() if name in known}
    pipeline.scheduler = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config, **chosen)
    pipeline.set_progress_bar_config(disable=True)
    latents: Tensor = pipeline(
        PROMPTS, num_inference_steps=steps, guidance_scale=guidance, latents=NOISE, output_type="latent"
    ).images
    return latents


@cache
def _pipeline(kind: Any, base: Path) -> Any:
    return kind.from_pretrained(base)


def sampler_of(family: Family, scheduler: str | None, steps: int, guidance: float, **settings: Any) -> Any:
    denoiser = Denoiser(family.load_unet(), family.schedule, family.prediction_type)
    return make_sampler(denoiser, steps, guidance, scheduler=scheduler, **settings)


@pytest.mark.parametrize(
    ("kind", "scheduler", "steps", "spacing"),
    [
        *(("sd", name, 5, "trailing") for name in ODE_SCHEDULERS),
        *(("sdxl", name, 5, "trailing") for name in ("EulerDiscreteScheduler", "UniPCMultistepScheduler")),
        *(("sd", name, 4, "leading") for name in ("EulerDiscreteScheduler", "PNDMScheduler")),
        *(("sd-v", name, 4, "trailing") for name in ("EulerDiscreteScheduler", "UniPCMultistepScheduler")),
        ("sdxl", "DPMSolverMultistepScheduler", 4, "leading"),
        ("sd", "EulerDiscreteScheduler", 1, "trailing"),
    ],
)
def test_it_equals_the_stock_pipeline(
    bases: dict[str, Path], kind: str, scheduler: str, steps: int, spacing: Any
) -> None:
    family = detect_family(str(bases[kind]))
    expected = by_the_pipeline(bases[kind], scheduler, steps, 4.0, timestep_spacing=spacing, steps_offset=1)
    sampler = sampler_of(family, scheduler, steps, 4.0, spacing=spacing)
    scale = float(expected.std())
    for _ in range(2):  # the second time shows that nothing is left of the first
        found = sampler(NOISE, family.encode_prompts(PROMPTS))
        # Diffusers makes alphas_cumprod in float32, we in float64.
        torch.testing.assert_close(found / scale, expected / scale, rtol=1e-3, atol=1e-3)


def test_guidance_one_is_one_call_a_step_without_guidance(bases: dict[str, Path]) -> None:
    family = detect_family(str(bases["sd"]))
    sampler = sampler_of(family, "EulerDiscreteScheduler", 3, 1.0)
    sizes: list[int] = []
    sampler.denoiser.unet.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    found = sampler(NOISE, family.encode_prompts(PROMPTS))
    expected = by_the_pipeline(bases["sd"], "EulerDiscreteScheduler", 3, 1.0, timestep_spacing="trailing")
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert sizes == [2, 2, 2] and not found.requires_grad


def test_ddim_of_diffusers_is_ours(bases: dict[str, Path]) -> None:
    family = detect_family(str(bases["sd-v"]))
    ours, theirs = (sampler_of(family, name, 4, 3.0) for name in (None, "DDIMScheduler"))
    assert isinstance(ours, TargetSampler) and isinstance(theirs, SchedulerSampler)
    conditioning = family.encode_prompts(PROMPTS)
    torch.testing.assert_close(ours(NOISE, conditioning), theirs(NOISE, conditioning), rtol=1e-4, atol=1e-4)


def test_a_base_that_ends_in_pure_noise_is_sampled_from_there() -> None:
    stock = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        set_alpha_to_one=False,
        clip_sample=False,
    )
    denoiser = Denoiser(tiny_sd_unet(), NoiseSchedule.from_scheduler_config(stock.config), "v_prediction")
    conditioning = tiny_conditioning(2)
    stock.set_timesteps(3)
    expected = NOISE
    with torch.no_grad():
        for timestep in stock.timesteps:
            output = denoiser.unet(
                expected, timestep, encoder_hidden_states=conditioning.prompt_embeds
            ).sample
            expected = stock.step(output, timestep, expected).prev_sample
    found = SchedulerSampler(denoiser, 3, 1.0, "DDIMScheduler")(NOISE, conditioning)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    euler = SchedulerSampler(denoiser, 3, 1.0, "EulerDiscreteScheduler")(NOISE, conditioning)
    assert bool(euler.isfinite().all())
    with pytest.raises(ValueError, match="ends in pure noise .* which PNDMScheduler does not take"):
        SchedulerSampler(denoiser, 3, 1.0, "PNDMScheduler")


@pytest.mark.parametrize("name", ["EulerAncestralDiscreteScheduler", "LCMScheduler", "EulerScheduler", "os"])
def test_schedulers_that_draw_noise_are_refused(name: str) -> None:
    denoiser = Denoiser(tiny_sd_unet(), NoiseSchedule.scaled_linear(), "epsilon")
    with pytest.raises(
        ValueError, match=f"scheduler '{name}' is not known .*accepted are DDIMScheduler, PNDM"
    ):
        make_sampler(denoiser, 4, 3.0, scheduler=name)


def test_a_base_that_predicts_the_sample_goes_with_ddim_only() -> None:
    denoiser = Denoiser(tiny_sd_unet(), NoiseSchedule.scaled_linear(), "sample")
    assert isinstance(make_sampler(denoiser, 4, 3.0), TargetSampler)
    with pytest.raises(ValueError, match="predicts 'sample', which HeunDiscreteScheduler does not take"):
        make_sampler(denoiser, 4, 3.0, scheduler="HeunDiscreteScheduler")


def test_betas_give_the_schedule_back() -> None:
    schedule = NoiseSchedule.scaled_linear()
    betas = schedule.betas()
    assert len(betas) == 1000 and betas[0] == pytest.approx(0.00085) and betas[-1] == pytest.approx(0.012)
    torch.testing.assert_close(
        NoiseSchedule(betas).alphas_cumprod, schedule.alphas_cumprod, rtol=1e-6, atol=0
    )
