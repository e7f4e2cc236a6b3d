"""Sampling of one-step and few-step students, and the training inputs of the later steps ("backward simulation").

A few-step student denoises, adds fresh noise to the result, and denoises again at the next timestep. Noised data would not be
what its later steps receive at inference, so training feeds them the output of its earlier steps.

The fresh noise is a function of the initial noise: the same noise and prompt give the same latents in training, in
evaluation, on any device and in any batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sdxs_lightning.core.batch import Conditioning
from sdxs_lightning.core.noise_schedule import add_noise
from sdxs_lightning.core.seeding import Stream, fingerprint_values, integers, normal, uniform
from sdxs_lightning.networks.denoiser import Denoiser
from sdxs_lightning.networks.network import no_param_grad

FreshNoise = Callable[[Tensor, int], Tensor]
"""Maps the initial noise (B, C, h, w) and a step's index, counted from 0, to the noise added before that step."""


class ImageStarts(NamedTuple):
    """Samples that begin at a later step from a noised image, as in image to image, rather than from noise."""

    latents: Tensor
    """(B, C, h, w), float32: the images' scaled latents."""
    steps: Tensor
    """(B,), int64: index of the step at which a sample begins; 0 begins from noise."""


def one_step(denoiser: Denoiser, noise: Tensor, conditioning: Conditioning, timestep: int) -> Tensor:
    """Maps noise to clean latents in one step: the network's x_0 estimate at a constant timestep.

    Args:
        denoiser: the student's network.
        noise: (B, C, h, w), N(0, 1), unscaled whatever the timestep is (DMD2's "timestep shift" for SDXL).
        conditioning: of B prompts.
        timestep: the conditioning timestep.

    Returns:
        (B, C, h, w), float32, scaled latents.

    Source: DMD2, arXiv:2405.14867, section 4.2.
    """
    timesteps = torch.full((len(noise),), timestep, dtype=torch.int64, device=noise.device)
    prediction = denoiser(noise, timesteps, conditioning)
    pred_x0: Tensor = prediction.pred_x0
    return pred_x0


def fresh_noise(noise: Tensor, step: int) -> Tensor:
    """N(0, 1) of the shape of `noise`, determined by its bits and by the step, independent of both; float32."""
    return normal(step, Stream.STEP_NOISE, fingerprint_values(noise), tuple(noise.shape[1:]))


def sample_in_steps(
    denoiser: Denoiser,
    noise: Tensor,
    conditioning: Conditioning,
    timesteps: Sequence[int],
    fresh: FreshNoise = fresh_noise,
) -> Tensor:
    """Maps noise to clean latents through all steps; with one timestep this is `one_step`.

    Args:
        denoiser: the student's network.
        noise: (B, C, h, w), N(0, 1).
        conditioning: of B prompts.
        timesteps: one per step, decreasing.
        fresh: makes the noise of the later steps.

    Returns:
        (B, C, h, w), float32, scaled latents.

    Source: DMD2, arXiv:2405.14867, section 4.4; equals the loop over diffusers' LCMScheduler.
    """
    latents = one_step(denoiser, noise, conditioning, timesteps[0])
    for step, timestep in enumerate(timesteps[1:], start=1):
        noisy = _renoise(denoiser, latents, fresh(noise, step), timestep)
        latents = one_step(denoiser, noisy, conditioning, timestep)
    return latents


def draw_image_starts(
    seed: int, positions: Tensor, latents: Tensor, step: int, share: float
) -> ImageStarts | None:
    """Draws which samples begin from their image, and at which step.

    Args:
        seed: the run's seed.
        positions: (B,), int64, of the samples in the run.
        latents: (B, C, h, w), float32, the images' scaled latents.
        step: index of the step that is trained; an image begins at one of 1 to `step`, with equal probabilities.
        share: of the samples that begin from their image.

    Returns:
        None for the first step, which receives noise.
    """
    if step == 0:
        return None
    chosen = uniform(seed, Stream.IMAGE_STARTS, positions) < share
    first = integers(seed, Stream.IMAGE_START_STEP, positions, 1, step + 1)
    return ImageStarts(latents, torch.where(chosen, first, torch.zeros_like(first)))


def simulated_sample(
    denoiser: Denoiser,
    noise: Tensor,
    conditioning: Conditioning,
    timesteps: Sequence[int],
    step: int,
    starts: ImageStarts | None = None,
) -> Tensor:
    """The student's prediction at one of its steps; used in training.

    The steps before it run under no_grad, exactly as in `sample_in_steps`; the first step has none.

    Args:
        denoiser: the student's network.
        noise: (B, C, h, w), N(0, 1).
        conditioning: of B prompts.
        timesteps: one per step, decreasing.
        step: index of the step, counted from 0; the same on all ranks, which call a sharded network equally often.
        starts: samples that begin at a later step from an image; None begins all from noise.

    Returns:
        (B, C, h, w), float32, scaled latents, with the graph of that step only.

    Source: DMD2, arXiv:2405.14867, section 4.5.
    """
    noisy = noise
    # no_param_grad: under no_grad, autocast would cache graph-less casts of the weights and reuse them in the pass below.
    with torch.no_grad(), no_param_grad(denoiser):
        for index in range(step):
            latents = one_step(denoiser, noisy, conditioning, timesteps[index])
            fresh, timestep = fresh_noise(noise, index + 1), timesteps[index + 1]
            noisy = _renoise(denoiser, latents, fresh, timestep)
            if starts is not None:
                from_image = _renoise(denoiser, starts.latents, fresh, timestep)
                begins = (starts.steps == index + 1).view(-1, 1, 1, 1)
                noisy = torch.where(begins, from_image, noisy)
    return one_step(denoiser, noisy, conditioning, timesteps[step])


def check_timesteps(timesteps: Sequence[int], num_train_timesteps: int) -> None:
    """Checks that the exported pipeline can visit the timesteps.

    Raises:
        ValueError: for a timestep outside the schedule, or several that no `original_inference_steps` reproduces.
    """
    if not timesteps or not all(0 <= timestep < num_train_timesteps for timestep in timesteps):
        raise ValueError(
            f"timesteps of a student must be one or more in [0, {num_train_timesteps - 1}], got {list(timesteps)}; change "
            "student.init_args.timesteps."
        )
    if len(timesteps) > 1:
        original_inference_steps(timesteps)


def original_inference_steps(timesteps: Sequence[int]) -> int:
    """Finds the `original_inference_steps` with which diffusers' LCMScheduler visits exactly `timesteps`.

    That scheduler has `original_inference_steps` evenly spaced timesteps up to the last training timestep, of which a
    sampler visits some.

    Args:
        timesteps: one per step, decreasing; the first is the last training timestep.

    Raises:
        ValueError: if no setting does.

    Source: LCM, arXiv:2310.04378, as in LCMScheduler.set_timesteps of diffusers.
    """
    total, steps = timesteps[0] + 1, len(timesteps)
    for original in range(steps, total + 1):
        if total % original:
            continue  # would not start at the first timestep
        known = np.arange(original, 0, -1) * (total // original) - 1
        visited = known[np.floor(np.linspace(0, original, num=steps, endpoint=False)).astype(np.int64)]
        if visited.tolist() == list(timesteps):
            return original
    raise ValueError(
        f"the timesteps {list(timesteps)} are none that a stock LCMScheduler visits in {steps} calls; evenly spaced ones down "
        "from the first are, such as [999, 749, 499, 249] or [399, 299, 199, 99]. Change student.init_args.timesteps."
    )


def _renoise(denoiser: Denoiser, latents: Tensor, noise: Tensor, timestep: int) -> Tensor:
    timesteps = torch.full((len(latents),), timestep, dtype=torch.int64, device=latents.device)
    return add_noise(latents, noise, timesteps, denoiser.schedule)
