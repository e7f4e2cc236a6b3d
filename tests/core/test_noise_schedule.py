"""The noise schedule: identities, round trips, precision, refusals."""

import copy

import pytest
import torch
from torch import nn

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

TIMESTEPS = torch.tensor([0, 20, 500, 980, 999])


def pair(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents, noise = torch.randn(2, len(TIMESTEPS), 4, 8, 8, generator=generator).to(dtype)
    return latents, noise


def test_the_known_numbers_of_stable_diffusion() -> None:
    schedule = NoiseSchedule.scaled_linear()
    assert schedule.alpha[999].item() == pytest.approx(0.0682651, abs=1e-6)
    assert schedule.sigma[999].item() == pytest.approx(0.9976672, abs=1e-6)
    assert (schedule.sigma[999] / schedule.alpha[999]).item() == pytest.approx(14.6146, abs=1e-3)
    torch.testing.assert_close(schedule.alpha**2 + schedule.sigma**2, torch.ones(1000), rtol=0, atol=2e-7)
    assert (schedule.alphas_cumprod.diff() < 0).all()


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_target_decodes_to_the_latents_and_the_noise(prediction_type: PredictionType) -> None:
    latents, noise = pair()
    schedule = NoiseSchedule.scaled_linear()
    noisy = add_noise(latents, noise, TIMESTEPS, schedule)
    target = target_of(prediction_type, latents, noise, TIMESTEPS, schedule)
    pred_x0 = to_pred_x0(target, noisy, TIMESTEPS, schedule, prediction_type)
    noise_pred = to_noise_pred(target, noisy, TIMESTEPS, schedule, prediction_type)
    torch.testing.assert_close(pred_x0, latents, rtol=0, atol=1e-5)
    torch.testing.assert_close(noise_pred, noise, rtol=0, atol=2e-5)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_from_and_to_pred_x0_undo_one_another(prediction_type: PredictionType) -> None:
    pred_x0, noisy = pair()
    schedule = NoiseSchedule.scaled_linear()
    output = from_pred_x0(pred_x0, noisy, TIMESTEPS, schedule, prediction_type)
    back = to_pred_x0(output, noisy, TIMESTEPS, schedule, prediction_type)
    torch.testing.assert_close(back, pred_x0, rtol=0, atol=2e-5)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_half_precision_outputs_are_converted_in_float32(prediction_type: PredictionType) -> None:
    output, noisy = pair(torch.bfloat16)
    schedule = NoiseSchedule.scaled_linear()
    got = to_pred_x0(output, noisy, TIMESTEPS, schedule, prediction_type)
    expected = to_pred_x0(output.float(), noisy.float(), TIMESTEPS, schedule, prediction_type)
    assert got.dtype == torch.float32
    assert torch.equal(got, expected)


def test_the_schedule_keeps_float32_and_leaves_no_trace_in_checkpoints() -> None:
    schedule, net = NoiseSchedule.scaled_linear(), nn.Linear(2, 2)
    holder = nn.ModuleDict({"schedule": schedule, "net": net})
    before = schedule.alphas_cumprod.clone()
    holder.to(torch.bfloat16)
    assert net.weight.dtype == torch.bfloat16
    assert torch.equal(schedule.alphas_cumprod, before)
    assert schedule.alphas_cumprod.dtype == torch.float32
    assert not [name for name in holder.state_dict() if name.startswith("schedule")]
    assert torch.equal(copy.deepcopy(schedule).sigma, schedule.sigma)


def test_the_schedule_survives_the_meta_device() -> None:
    with torch.device("meta"):
        schedule = NoiseSchedule.scaled_linear()
    schedule.to("meta").to_empty(device="cpu")
    assert torch.equal(schedule.sigma, NoiseSchedule.scaled_linear().sigma)


def test_gradients_reach_the_output() -> None:
    output, noisy = pair()
    output.requires_grad_()
    schedule = NoiseSchedule.scaled_linear()
    to_pred_x0(output, noisy, TIMESTEPS, schedule, "epsilon").sum().backward()
    assert output.grad is not None
    expected = -(schedule.sigma / schedule.alpha)[TIMESTEPS]
    torch.testing.assert_close(output.grad[:, 0, 0, 0], expected)


def test_refusals() -> None:
    latents, noise = pair()
    schedule = NoiseSchedule.scaled_linear()
    with pytest.raises(ValueError, match=r"one timestep per sample, got .* timesteps of shape \(1,\)"):
        add_noise(latents, noise, TIMESTEPS[:1], schedule)
    with pytest.raises(ValueError, match="must have one shape, got"):
        add_noise(latents, noise[:1], TIMESTEPS, schedule)
    with pytest.raises(ValueError, match=r"timesteps must be in \[0, 999\], got .*1000"):
        add_noise(latents, noise, TIMESTEPS + 1, schedule)
    with pytest.raises(ValueError, match=r"timesteps must be in \[0, 999\], got \[-1"):
        add_noise(latents, noise, TIMESTEPS - 1, schedule)
    with pytest.raises(ValueError, match=r"timesteps must be \(B,\) int64, got .*float32"):
        add_noise(latents, noise, TIMESTEPS.float(), schedule)
    with pytest.raises(ValueError, match="prediction_type 'flow' is not known; accepted are epsilon"):
        to_pred_x0(latents, noise, TIMESTEPS, schedule, "flow")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="beta_schedule 'sigmoid' .* accepted are linear, scaled_linear"):
        NoiseSchedule.from_scheduler_config({"beta_schedule": "sigmoid"})
    with pytest.raises(ValueError, match="zero terminal SNR .* got 'epsilon'"):
        NoiseSchedule.from_scheduler_config({"rescale_betas_zero_snr": True})
    with pytest.raises(ValueError, match=r"betas must be one row of numbers in \(0, 1\]"):
        NoiseSchedule([0.1, 1.5])
