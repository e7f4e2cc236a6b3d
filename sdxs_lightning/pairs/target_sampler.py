"""Few-step ODE sampler with guidance, for the pairs' targets and the teacher's images."""

from __future__ import annotations

import torch
from torch import Tensor

from sdxs_lightning.core.batch import Conditioning
from sdxs_lightning.core.timesteps import Spacing, few_step_timesteps
from sdxs_lightning.networks.denoiser import Denoiser
from sdxs_lightning.pairs.scheduler_sampler import SchedulerSampler


class TargetSampler:
    """Deterministic DDIM sampler.

    x_s = alpha_s pred_x0 + sigma_s noise_pred for each step t -> s; after the last step alpha_s is that of timestep 0,
    as in Stable Diffusion's scheduler configs (`set_alpha_to_one: false`).

    Args:
        denoiser: usually the frozen real score, or a few-step checkpoint.
        steps: number of network calls.
        guidance_scale: 1 means none.
        spacing: "leading" is in SD's configs; "trailing" starts at the last timestep and is better below about ten steps.
        steps_offset: added to "leading" timesteps; 1 in SD's configs.

    Source: arXiv:2010.02502, eq. 12 with eta 0; equals the loop over diffusers' DDIMScheduler.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        steps: int,
        guidance_scale: float,
        spacing: Spacing = "trailing",
        steps_offset: int = 1,
    ) -> None:
        self.denoiser = denoiser
        self.guidance_scale = guidance_scale
        total = denoiser.schedule.num_train_timesteps
        self.timesteps = few_step_timesteps(steps, total, spacing, steps_offset)
        # As in diffusers: one spacing back, rather than the next visited timestep.
        self._previous = [timestep - total // steps for timestep in self.timesteps]

    @torch.no_grad()
    def __call__(self, noise: Tensor, conditioning: Conditioning) -> Tensor:
        """Maps noise (B, C, h, w) to scaled latents (B, C, h, w), float32; guidance scales of the conditioning go first."""
        latents = noise.float()
        guidance_scale = conditioning.guidance_scale(self.guidance_scale)
        schedule = self.denoiser.schedule
        for timestep, previous in zip(self.timesteps, self._previous, strict=True):
            timesteps = self._full(timestep, latents)
            _, pred_x0, noise_pred = self.denoiser.guided(latents, timesteps, conditioning, guidance_scale)
            goal = self._full(max(previous, 0), latents)
            latents = schedule.alpha_t(goal) * pred_x0 + schedule.sigma_t(goal) * noise_pred
        return latents

    @staticmethod
    def _full(timestep: int, latents: Tensor) -> Tensor:
        return torch.full((len(latents),), timestep, dtype=torch.int64, device=latents.device)


def make_sampler(
    denoiser: Denoiser,
    steps: int,
    guidance_scale: float,
    spacing: Spacing = "trailing",
    scheduler: str | None = None,
) -> TargetSampler | SchedulerSampler:
    """Builds the target sampler for a scheduler.

    Args:
        denoiser: the network.
        steps: number of scheduler steps.
        guidance_scale: 1 means none.
        spacing: timestep spacing.
        scheduler: class name in diffusers, one of ODE_SCHEDULERS; None uses `TargetSampler`.

    Raises:
        ValueError: for an unknown scheduler, or one that cannot sample this base.
    """
    if scheduler is None:
        return TargetSampler(denoiser, steps, guidance_scale, spacing)
    return SchedulerSampler(denoiser, steps, guidance_scale, scheduler, spacing)
