"""Target sampler with a deterministic scheduler of diffusers."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from sdxs_lightning.core.batch import Conditioning
from sdxs_lightning.core.noise_schedule import NoiseSchedule, PredictionType
from sdxs_lightning.core.timesteps import Spacing
from sdxs_lightning.networks.denoiser import Denoiser
from sdxs_lightning.pairs.ode_schedulers import ODE_SCHEDULERS, check_scheduler


def scheduler_config(
    name: str, schedule: NoiseSchedule, prediction_type: PredictionType, spacing: Spacing, steps_offset: int
) -> dict[str, Any]:
    """Returns the constructor arguments of a scheduler for a base, limited to those that the class accepts.

    Args:
        name: one of ODE_SCHEDULERS.
        schedule: the base's noise schedule.
        prediction_type: the base's prediction type.
        spacing: `timestep_spacing`.
        steps_offset: offset of "leading" timesteps.

    Raises:
        ValueError: for an unknown scheduler, or one that cannot sample this base.
    """
    import diffusers

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
        # Rescaling is idempotent, and makes the class accept a terminal alpha of 0.
        "rescale_betas_zero_snr": terminal <= 0,
        # Stable Diffusion's values, which differ from the classes' defaults.
        "clip_sample": False,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
    }
    return {key: value for key, value in wanted.items() if key in accepted}


class SchedulerSampler:
    """Samples latents from noise along the probability-flow ODE, like a diffusers pipeline.

    Args:
        denoiser: usually the frozen real score, or a few-step checkpoint.
        steps: argument of `set_timesteps`; higher-order schedulers call the network more often.
        guidance_scale: 1 means none.
        scheduler: one of ODE_SCHEDULERS.
        spacing: "trailing" starts at the last timestep.
        steps_offset: added to "leading" timesteps; 1 in SD's configs.

    Raises:
        ValueError: for an unknown scheduler, or one that cannot sample this base.

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
        import diffusers

        self.denoiser = denoiser
        self.steps, self.guidance_scale = steps, guidance_scale
        self._class = getattr(diffusers, scheduler) if scheduler in ODE_SCHEDULERS else None
        self._config = scheduler_config(
            scheduler, denoiser.schedule, denoiser.prediction_type, spacing, steps_offset
        )

    @torch.no_grad()
    def __call__(self, noise: Tensor, conditioning: Conditioning) -> Tensor:
        """Maps noise (B, C, h, w) to scaled latents (B, C, h, w), float32; guidance scales of the conditioning go first."""
        assert self._class is not None
        # A new instance per call, since some keep the outputs of the previous sample.
        scheduler = self._class(**self._config)
        scheduler.set_timesteps(self.steps, device=noise.device)
        latents = noise.float() * scheduler.init_noise_sigma
        guidance_scale = conditioning.guidance_scale(self.guidance_scale)
        for timestep in scheduler.timesteps:
            scaled = scheduler.scale_model_input(latents, timestep)
            output = self.denoiser.guided_output(
                scaled, timestep.expand(len(noise)), conditioning, guidance_scale
            )
            latents = scheduler.step(output, timestep, latents).prev_sample
        result: Tensor = latents.float()
        return result
