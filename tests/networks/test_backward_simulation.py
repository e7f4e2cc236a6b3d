"""Students of several steps: sampling, the samples that training uses, and what stock diffusers makes of an export."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from sdxs_lightning.core.batch import Conditioning
from sdxs_lightning.core.seeding import Stream, fingerprint_values, normal
from sdxs_lightning.export import export_pipeline, one_step_scheduler, several_step_scheduler
from sdxs_lightning.families.sd import StableDiffusion
from sdxs_lightning.families.sdxl import StableDiffusionXL
from sdxs_lightning.networks.backward_simulation import (
    ImageStarts,
    draw_image_starts,
    fresh_noise,
    one_step,
    original_inference_steps,
    sample_in_steps,
    simulated_sample,
)
from sdxs_lightning.networks.ema import StudentEma
from sdxs_lightning.networks.student_generator import StudentGenerator
from tests.helpers.tiny import LATENT_SHAPE, save_tiny_sd, save_tiny_sdxl

FOUR = [999, 749, 499, 249]
CAPTIONS = ["a red circle", "a blue star on a white background"]
SGD = partial(torch.optim.SGD, lr=0.1)
Kind = tuple[str, str]
KINDS: list[Kind] = [("sd", "v_prediction"), ("sdxl", "epsilon")]


@pytest.fixture(scope="module", params=KINDS, ids=["sd-v", "sdxl-epsilon"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    kind, prediction_type = request.param
    folder = tmp_path_factory.mktemp("base") / kind
    if kind == "sd":
        return StableDiffusion(str(save_tiny_sd(folder, prediction_type)))
    return StableDiffusionXL(str(save_tiny_sdxl(folder, prediction_type)))


def student_of(family: Any, **settings: Any) -> StudentGenerator:
    student = StudentGenerator(SGD, **settings)
    student.build(family)
    return student


def noise_of(count: int, seed: int = 0) -> Tensor:
    return normal(seed, Stream.STUDENT_NOISE, torch.arange(count), LATENT_SHAPE)


def prompts_of(family: Any, count: int) -> Conditioning:
    conditioning: Conditioning = family.encode_prompts([CAPTIONS[i % 2] for i in range(count)])
    return conditioning


def test_one_step_is_the_plain_call_to_the_last_bit(family: Any) -> None:
    noise, conditioning = noise_of(2), prompts_of(family, 2)
    student = student_of(family)
    timestep = family.conditioning_timestep
    expected = one_step(student.denoiser, noise, conditioning, timestep)
    timesteps = torch.full((2,), timestep)
    assert torch.equal(expected, student.denoiser(noise, timesteps, conditioning).pred_x0)
    for found in (student(noise, conditioning), student.simulate(noise, conditioning)):
        assert torch.equal(found, expected)
    # A copy of the weights lies elsewhere in memory, and products round by that.
    torch.testing.assert_close(StudentEma(student, 0.5)(noise, conditioning), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_steps_are_denoising_and_fresh_noise_alternating(family: Any) -> None:
    """By hand, on the raw network, with alphas_cumprod of diffusers' own schedule."""
    noise, conditioning = noise_of(2), prompts_of(family, 2)
    student = student_of(family, timesteps=FOUR)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    abar = torch.cumprod(1 - betas, 0)
    noisy, x0 = noise, noise
    for step, timestep in enumerate(FOUR):
        alpha, sigma = float(abar[timestep].sqrt()), float((1 - abar[timestep]).sqrt())
        if step:
            noisy = alpha * x0 + sigma * fresh_noise(noise, step)
        timesteps = torch.full((2,), timestep)
        output = student.denoiser.unet(noisy, timesteps, **conditioning.unet_kwargs()).sample
        v = family.prediction_type == "v_prediction"
        x0 = alpha * noisy - sigma * output if v else (noisy - sigma * output) / alpha
    size = float(x0.abs().max())
    for found in (student(noise, conditioning), StudentEma(student, 0.5)(noise, conditioning)):
        torch.testing.assert_close(found, x0, rtol=1e-4, atol=1e-5 * size)


def test_training_sees_what_sampling_visits(family: Any) -> None:
    """Cutting the sampler's loop after a step gives the training's sample, with graph of that step alone."""
    noise, conditioning, step = noise_of(2), prompts_of(family, 2), 2
    student = student_of(family, timesteps=FOUR)
    calls: list[tuple[bool, list[int]]] = []
    student.denoiser.unet.register_forward_pre_hook(
        lambda module, inputs: calls.append((torch.is_grad_enabled(), inputs[1].tolist()))
    )
    found = student.simulate(noise, conditioning, step)
    assert calls == [(index == step, [FOUR[index]] * 2) for index in range(step + 1)]
    with torch.no_grad():
        expected = sample_in_steps(student.denoiser, noise, conditioning, FOUR[: step + 1])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    # The graph is that of the drawn step: its gradient equals that of the one call with its input held fixed.
    gradients = torch.autograd.grad(found.sum(), list(student.parameters()), allow_unused=True)
    assert all(gradient is not None for gradient in gradients)
    with torch.no_grad():
        inputs = _input_of(student, noise, conditioning, step)
    alone = student.denoiser(inputs, torch.tensor([FOUR[step]] * 2), conditioning).pred_x0
    expected_gradients = torch.autograd.grad(alone.sum(), list(student.parameters()))
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()) + 1e-6)


@torch.no_grad()
def test_samples_that_begin_from_an_image_continue_like_image_to_image(family: Any) -> None:
    """By hand: the noised image at the step where a sample begins, and the student's own steps after it."""
    noise, conditioning = noise_of(4), prompts_of(family, 4)
    images = torch.randn(4, *LATENT_SHAPE, generator=torch.Generator().manual_seed(3))
    student, schedule = student_of(family, timesteps=FOUR), family.schedule
    found = student.simulate(noise, conditioning, 2, ImageStarts(images, torch.tensor([0, 1, 2, 1])))
    for row, first in enumerate([0, 1, 2, 1]):
        one, x0 = slice(row, row + 1), images[row : row + 1]
        for step in range(first, 3):
            timesteps = torch.tensor([FOUR[step]])
            noisy = schedule.alpha_t(timesteps) * x0
            noisy = noisy + schedule.sigma_t(timesteps) * fresh_noise(noise[one], step)
            x0 = one_step(student.denoiser, noisy if step else noise[one], conditioning[one], FOUR[step])
        torch.testing.assert_close(found[one], x0, rtol=1e-4, atol=1e-4 * float(x0.abs().max()))


def test_image_starts_are_a_share_and_spread_over_the_steps() -> None:
    positions, images = torch.arange(6000), torch.zeros(6000, 1, 1, 1)
    assert draw_image_starts(0, positions, images, 0, 1.0) is None
    drawn = draw_image_starts(0, positions, images, 3, 0.25)
    assert drawn is not None
    shares = torch.bincount(drawn.steps, minlength=4) / 6000
    torch.testing.assert_close(shares, torch.tensor([0.75, 1 / 12, 1 / 12, 1 / 12]), rtol=0, atol=0.02)
    for share, steps in ((0.0, [0]), (1.0, [1, 2])):
        drawn = draw_image_starts(0, positions, images, 2, share)
        assert drawn is not None and drawn.steps.unique().tolist() == steps


@pytest.mark.parametrize(
    ("share", "timesteps"), [(0.5, None), (0.5, [999]), (-0.1, FOUR), (1.5, FOUR), (float("nan"), FOUR)]
)
def test_image_starts_that_are_no_share_are_refused(share: float, timesteps: list[int] | None) -> None:
    with pytest.raises(ValueError, match=f"image_starts is {share}, .*Change student.init_args"):
        StudentGenerator(SGD, timesteps=timesteps, image_starts=share)


def _input_of(student: StudentGenerator, noise: Tensor, conditioning: Conditioning, step: int) -> Tensor:
    schedule, timesteps = student.denoiser.schedule, torch.tensor([FOUR[step]])
    x0 = sample_in_steps(student.denoiser, noise, conditioning, FOUR[:step])
    return schedule.alpha_t(timesteps) * x0 + schedule.sigma_t(timesteps) * fresh_noise(noise, step)


def test_under_autocast_every_weight_gets_its_gradient(family: Any) -> None:
    """The casts that the passes without graph would leave in autocast's cache have none."""
    student = student_of(family, timesteps=[999, 499])
    with torch.autocast("cpu", torch.bfloat16):
        student.simulate(noise_of(4), prompts_of(family, 4), 1).sum().backward()
    assert all(parameter.requires_grad and parameter.grad is not None for parameter in student.parameters())


def test_fresh_noise_is_new_for_every_step_and_sample() -> None:
    noise = noise_of(64)
    later = [fresh_noise(noise, step) for step in (1, 2, 3)]
    assert torch.equal(later[0][5:9], fresh_noise(noise[5:9], 1))
    flat = torch.stack([noise, *later]).flatten(1)
    correlation = torch.corrcoef(flat) - torch.eye(4)
    assert correlation.abs().max() < 4 / flat.shape[1] ** 0.5
    assert later[0].mean().abs() < 0.02 and abs(float(later[0].std()) - 1) < 0.02


def test_fingerprints_tell_values_and_their_order() -> None:
    values = torch.tensor([[1.0, 2.0, 3.0], [2.0, 1.0, 3.0], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0000002]])
    first, swapped, same, near = fingerprint_values(values).tolist()
    assert first == same and len({first, swapped, near}) == 3
    assert fingerprint_values(values.double()).tolist() == [first, swapped, same, near]


class _Recorded:
    """Fresh noise as a pipeline's generator makes it."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, noise: Tensor, step: int) -> Tensor:
        return torch.randn(noise.shape, generator=self.generator)


@pytest.mark.parametrize("timesteps", [FOUR, [399, 199], [999, 759, 499, 259]], ids=str)
@torch.no_grad()
def test_stock_pipeline_equals_the_student(family: Any, timesteps: list[int], tmp_path: Path) -> None:
    student = student_of(family, timesteps=timesteps)
    student.denoiser.unet.conv_out.weight.mul_(1.5)  # not the base's network
    noise, conditioning = noise_of(2, seed=9), family.encode_prompts(CAPTIONS)
    latents = sample_in_steps(student.denoiser, noise, conditioning, timesteps, _Recorded(5))
    folder = export_pipeline(
        student.denoiser.unet, family, tmp_path / "out", dtype=torch.float32, timesteps=timesteps
    )
    pipeline = getattr(diffusers, family.pipeline_class).from_pretrained(folder)
    assert type(pipeline.scheduler).__name__ == "LCMScheduler"
    found = pipeline(
        CAPTIONS,
        num_inference_steps=len(timesteps),
        guidance_scale=0.0,
        latents=noise,
        width=32,
        height=32,
        generator=torch.Generator().manual_seed(5),
        output_type="latent",
    ).images
    torch.testing.assert_close(found, latents, rtol=1e-4, atol=1e-5 * float(latents.abs().max()))
    assert pipeline.scheduler.timesteps.tolist() == timesteps


def test_one_timestep_exports_the_one_step_scheduler(family: Any) -> None:
    scheduler = several_step_scheduler(family, FOUR)
    assert scheduler.config.num_train_timesteps == 1000 and scheduler.config.original_inference_steps == 4
    short = several_step_scheduler(family, [399, 299, 199, 99])
    expected = family.schedule.alphas_cumprod[[399, 299, 199, 99]]
    torch.testing.assert_close(short.alphas_cumprod[[399, 299, 199, 99]], expected, rtol=1e-5, atol=0)
    assert one_step_scheduler(family, 399).config.num_train_timesteps == 400


@pytest.mark.parametrize(
    ("timesteps", "original"),
    [
        (FOUR, 4),
        ([999, 499], 2),
        ([999, 759, 499, 259], 50),
        ([399, 299, 199, 99], 4),
        ([999, 600, 200], None),
    ],
)
def test_timesteps_that_a_stock_scheduler_visits(timesteps: list[int], original: int | None) -> None:
    if original is None:
        with pytest.raises(
            ValueError, match=r"\[999, 600, 200\] are none that a stock LCMScheduler visits in 3"
        ):
            original_inference_steps(timesteps)
        return
    assert original_inference_steps(timesteps) == original
    scheduler = diffusers.LCMScheduler(
        num_train_timesteps=timesteps[0] + 1, original_inference_steps=original, beta_schedule="scaled_linear"
    )
    scheduler.set_timesteps(len(timesteps))
    assert scheduler.timesteps.tolist() == timesteps


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"timesteps": [1000, 499]}, r"in \[0, 999\], got \[1000, 499\]; change student.init_args.timesteps"),
        ({"timesteps": []}, r"one or more in \[0, 999\], got \[\]"),
        ({"timesteps": [249, 499]}, "stock LCMScheduler"),
        ({"timesteps": FOUR, "conditioning_timestep": 999}, "set one of them"),
    ],
)
def test_timesteps_that_are_refused(family: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        student_of(family, **settings)


@torch.no_grad()
def test_simulation_of_one_timestep_needs_no_other_pass(family: Any) -> None:
    student = student_of(family, timesteps=[699])
    calls: list[int] = []
    student.denoiser.unet.register_forward_pre_hook(lambda module, inputs: calls.append(1))
    noise, conditioning = noise_of(1), prompts_of(family, 1)
    found = simulated_sample(student.denoiser, noise, conditioning, student.timesteps, 0)
    assert len(calls) == 1 and student.conditioning_timestep == 699
    assert torch.equal(found, one_step(student.denoiser, noise, conditioning, 699))
