"""The target sampler with any deterministic scheduler of diffusers, by its class name."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import torch
from torch import Tensor

from sdxs_lightning.core.batch import Conditioning
from sdxs_lightning.core.noise_schedule import NoiseSchedule, PredictionType
from sdxs_lightning.core.timesteps import Spacing
from sdxs_lightning.networks.denoiser import Denoiser

ODE_SCHEDULERS = (
    "DDIMScheduler",
    "PNDMScheduler",
    "LMSDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
)
"""Schedulers that map noise to latents without drawing noise of their own, as pairs need. Ancestral, SDE and LCM schedulers
draw noise between the steps."""


def check_scheduler(name: str) -> None:
    """Refuses everything but the ODE schedulers.

    Raises:
        ValueError: naming those that are.
    """
    if name not in ODE_SCHEDULERS:
        raise ValueError(
            f"scheduler '{name}' is not known as one that draws no noise of its own; accepted are "
            f"{', '.join(ODE_SCHEDULERS)}."
        )


def scheduler_config(
    name: str, schedule: NoiseSchedule, prediction_type: PredictionType, spacing: Spacing, steps_offset: int
) -> dict[str, Any]:
    """Constructor arguments of a scheduler for a base, those that the class has.

    Args:
        name: one of ODE_SCHEDULERS.
        schedule: of the base.
        prediction_type: of the base.
        spacing: `timestep_spacing`.
        steps_offset: of "leading" timesteps.

    Raises:
        ValueError: for a scheduler that is not known, or that cannot sample this base.
    """
    check_scheduler(name)
    accepted = inspect.signature(getattr(diffusers, name).__init__).parameters
    terminal = float(schedule.alphas_cumprod[-1]) if schedule.alphas_cumprod.device.type != "meta" else 1.0
    if prediction_type == "sample" or (terminal <= 0 and "rescale_betas_zero_snr" not in accepted):
        why = (
            "predicts 'sample'"
            if prediction_type == "sample"
            else "ends in pure noise (rescale_betas_zero_snr)"
        )
        raise ValueError(
            f"this base {why}, which {name} does not take here; set scheduler to null, which is DDIM."
        )
    wanted = {
        "num_train_timesteps": schedule.num_train_timesteps,
        "trained_betas": schedule.betas(),
        "prediction_type": prediction_type,
        "timestep_spacing": spacing,
        "steps_offset": steps_offset,
        # A second rescaling of rescaled betas changes nothing, and tells the class to expect the last of them.
        "rescale_betas_zero_snr": terminal <= 0,
        # The values in Stable Diffusion's configs, where the classes have other defaults.
        "clip_sample": False,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
    }
    return {key: value for key, value in wanted.items() if key in accepted}


class SchedulerSampler:
    """From noise to latents along the probability-flow ODE, as a diffusers pipeline does it.

    Args:
        denoiser: usually the frozen real score; may be another, few-step checkpoint.
        steps: as given to `set_timesteps`; schedulers of higher order call the network more often.
        guidance_scale: 1 means none.
        scheduler: one of ODE_SCHEDULERS.
        spacing: "trailing" begins at the last timestep.
        steps_offset: added to "leading" timesteps; 1 in SD's configs.

    Raises:
        ValueError: for a scheduler that is not known, or that cannot sample this base.

    Source: the denoising loop of diffusers' StableDiffusionPipeline.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        steps: int,
        guidance_scale: float,
        scheduler: str,
        spacing: Spacing = "trailing",
        steps_offset: int = 1,
    ) -> None:
        self.denoiser = denoiser
        self.steps, self.guidance_scale = steps, guidance_scale
        self._class = getattr(diffusers, scheduler) if scheduler in ODE_SCHEDULERS else None
        self._config = scheduler_config(
            scheduler, denoiser.schedule, denoiser.prediction_type, spacing, steps_offset
        )

    @torch.no_grad()
    def __call__(self, noise: Tensor, conditioning: Conditioning) -> Tensor:
        """Noise (B, C, h, w) -> scaled latents (B, C, h, w), float32."""
        assert self._class is not None
        # A new one each time: some keep the outputs of the previous sample.
        scheduler = self._class(**self._config)
        scheduler.set_timesteps(self.steps, device=noise.device)
        latents = noise.float() * scheduler.init_noise_sigma
        for timestep in scheduler.timesteps:
            scaled = scheduler.scale_model_input(latents, timestep)
            output = self.denoiser.guided_output(
                scaled, timestep.expand(len(noise)), conditioning, self.guidance_scale
            )
            latents = scheduler.step(output, timestep, latents).prev_sample
        result: Tensor = latents.float()
        return result
