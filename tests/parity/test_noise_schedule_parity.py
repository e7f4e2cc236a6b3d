"""The noise schedule and its conversions equal diffusers' schedulers."""

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from sdxs_lightning.core.noise_schedule import (
    PREDICTION_TYPES,
    NoiseSchedule,
    PredictionType,
    add_noise,
    from_pred_x0,
    target_of,
    to_noise_pred,
    to_pred_x0,
)
from sdxs_lightning.core.timesteps import Spacing, few_step_timesteps

SD_BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TIMESTEPS = torch.tensor([0, 1, 20, 399, 749, 980, 999])


def tensors(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(len(TIMESTEPS), 4, 8, 8, generator=generator) for _ in range(count)]


@pytest.mark.parametrize(
    "config",
    [
        SD_BETAS,
        {"beta_schedule": "linear"},
        {"beta_schedule": "squaredcos_cap_v2"},
        {**SD_BETAS, "num_train_timesteps": 250},
        {**SD_BETAS, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
        {"trained_betas": [0.001, 0.002, 0.01, 0.3], "num_train_timesteps": 4},
    ],
)
def test_alphas_cumprod_of_a_config(config: dict[str, Any]) -> None:
    reference = DDPMScheduler(**config)
    schedule = NoiseSchedule.from_scheduler_config(reference.config)
    assert schedule.num_train_timesteps == reference.config.num_train_timesteps
    # diffusers multiplies a thousand factors in float32: 2e-6 is its own rounding.
    torch.testing.assert_close(schedule.alphas_cumprod, reference.alphas_cumprod, rtol=5e-6, atol=1e-6)


def test_scaled_linear_is_the_schedule_of_stable_diffusion() -> None:
    torch.testing.assert_close(
        NoiseSchedule.scaled_linear().alphas_cumprod,
        DDPMScheduler(**SD_BETAS).alphas_cumprod,
        rtol=5e-6,
        atol=0,
    )


def test_add_noise_and_velocity_equal_ddpm() -> None:
    latents, noise = tensors(2)
    reference, schedule = DDPMScheduler(**SD_BETAS), NoiseSchedule.scaled_linear()
    torch.testing.assert_close(
        add_noise(latents, noise, TIMESTEPS, schedule),
        reference.add_noise(latents, noise, TIMESTEPS),
        rtol=1e-5,
        atol=2e-6,
    )
    torch.testing.assert_close(
        target_of("v_prediction", latents, noise, TIMESTEPS, schedule),
        reference.get_velocity(latents, noise, TIMESTEPS),
        rtol=1e-5,
        atol=2e-6,
    )


@pytest.mark.parametrize("scheduler_class", [DDPMScheduler, DDIMScheduler])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_pred_x0_equals_the_schedulers(scheduler_class: type, prediction_type: PredictionType) -> None:
    output, noisy_latents = tensors(2)
    reference = scheduler_class(**SD_BETAS, prediction_type=prediction_type, clip_sample=False)
    reference.set_timesteps(1000)
    schedule = NoiseSchedule.from_scheduler_config(reference.config)
    pred_x0 = to_pred_x0(output, noisy_latents, TIMESTEPS, schedule, prediction_type)
    for i, timestep in enumerate(TIMESTEPS.tolist()):
        expected = reference.step(output[i], timestep, noisy_latents[i]).pred_original_sample
        torch.testing.assert_close(pred_x0[i], expected, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_ddim_step_of_our_estimates_equals_the_schedulers(prediction_type: PredictionType) -> None:
    # x_s = alpha_s x_0 + sigma_s noise_pred: right only if both estimates are.
    output, noisy_latents = tensors(2)
    reference = DDIMScheduler(**SD_BETAS, prediction_type=prediction_type, clip_sample=False)
    reference.set_timesteps(4)
    schedule = NoiseSchedule.from_scheduler_config(reference.config)
    start, end = torch.full_like(TIMESTEPS, 750), torch.full_like(TIMESTEPS, 500)
    stepped = add_noise(
        to_pred_x0(output, noisy_latents, start, schedule, prediction_type),
        to_noise_pred(output, noisy_latents, start, schedule, prediction_type),
        end,
        schedule,
    )
    expected = reference.step(output, 750, noisy_latents).prev_sample
    torch.testing.assert_close(stepped, expected, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_from_pred_x0_makes_the_output_that_the_scheduler_decodes(prediction_type: PredictionType) -> None:
    pred_x0, noisy_latents = tensors(2)
    schedule = NoiseSchedule.scaled_linear()
    output = from_pred_x0(pred_x0, noisy_latents, TIMESTEPS, schedule, prediction_type)
    reference = DDIMScheduler(**SD_BETAS, prediction_type=prediction_type, clip_sample=False)
    reference.set_timesteps(1000)
    for i, timestep in enumerate(TIMESTEPS.tolist()):
        decoded = reference.step(output[i], timestep, noisy_latents[i]).pred_original_sample
        # At t = 0 sigma_t is 0.03 and v's rounding is multiplied by 34; at t = 999, 1 / alpha_t is 14.6.
        torch.testing.assert_close(decoded, pred_x0[i], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("spacing", ["trailing", "leading"])
@pytest.mark.parametrize("steps", [1, 2, 4, 7, 8, 16, 25, 50, 999])
@pytest.mark.parametrize("steps_offset", [0, 1])
def test_few_step_timesteps_equal_ddim(spacing: Spacing, steps: int, steps_offset: int) -> None:
    reference = DDIMScheduler(**SD_BETAS, timestep_spacing=spacing, steps_offset=steps_offset)
    reference.set_timesteps(steps)
    assert few_step_timesteps(steps, 1000, spacing, steps_offset) == reference.timesteps.tolist()
