"""What travels inside one micro-batch: the student's sample, and the networks that judge it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

from sdxs_lightning.core.batch import Conditioning
from sdxs_lightning.core.noise_schedule import NoiseSchedule, add_noise
from sdxs_lightning.core.seeding import Stream, normal
from sdxs_lightning.core.timesteps import TimestepRange
from sdxs_lightning.networks.denoiser import Denoiser
from sdxs_lightning.networks.discriminator import Discriminator
from sdxs_lightning.networks.fake_score import FakeScore


class Noisy(NamedTuple):
    """Latents after forward diffusion."""

    latents: Tensor
    """(B, C, h, w), float32: alpha_t * clean + sigma_t * noise."""
    timesteps: Tensor
    """(B,), int64."""
    noise: Tensor
    """(B, C, h, w), float32."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Sample:
    """Clean latents with their prompts, and the addresses of their noise."""

    latents: Tensor
    """(B, C, h, w), float32, scaled: pred_x0 of the student, or data."""
    conditioning: Conditioning
    """Of the same B samples."""
    positions: Tensor
    """(B,), int64: with the seed they determine every random number of the step."""
    seed: int
    """Of the run."""
    target: Tensor | None = None
    """(B, C, h, w), float32: what the target sampler made from the same noise and prompt, where the step uses pairs."""

    def detach(self) -> Sample:
        """The same sample without the student's graph."""
        return replace(self, latents=self.latents.detach())

    def renoise(
        self, schedule: NoiseSchedule, timesteps: TimestepRange, timestep_stream: Stream, noise_stream: Stream
    ) -> Noisy:
        """Forward diffusion to a random timestep per sample; differentiable in `latents`."""
        drawn = timesteps.draw(self.seed, timestep_stream, self.positions)
        noise = normal(self.seed, noise_stream, self.positions, tuple(self.latents.shape[1:]))
        return Noisy(add_noise(self.latents, noise, drawn, schedule), drawn, noise)


class DistillationContext(NamedTuple):
    """The networks that a student's objective may ask."""

    schedule: NoiseSchedule
    fake_score: FakeScore | None
    """None in a run that is warm-up only."""
    real_score: Denoiser | None
    """Frozen; None where no enabled part needs it."""
    discriminator: Discriminator | None
    """Of latents; None without, or where the GAN looks at images."""
    progress: float = 0.0
    """Share of the student updates after the warm-up that lie behind, for what changes over a run."""
