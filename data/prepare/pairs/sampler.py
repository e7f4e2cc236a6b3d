"""The networks behind a set of pairs, and one batch of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from data.prepare.pairs.prompts import Prompts
from data.prepare.pairs.settings import PairSettings
from sdxs_lightning.core.frozen import Frozen
from sdxs_lightning.core.pair_noise import noise_seeds, pair_noise
from sdxs_lightning.families import Family
from sdxs_lightning.families.detect import detect_family
from sdxs_lightning.networks.denoiser import Denoiser
from sdxs_lightning.pairs.target_sampler import make_sampler


class PairSampler:
    """Samples the pairs of given indices, always the same ones.

    Args:
        settings: of the set.
        prompts: of the set.
        device: where it samples.
    """

    def __init__(self, settings: PairSettings, prompts: Prompts, device: torch.device) -> None:
        self.settings, self.prompts, self.device = settings, prompts, device
        dtype: torch.dtype = getattr(torch, settings.dtype)
        self.family: Family = detect_family(settings.model, settings.config).to(device, dtype)
        unet = self.family.load_unet(settings.unet)
        denoiser = Denoiser(unet, self.family.schedule, self.family.prediction_type)
        network = Frozen(denoiser).to(device, dtype).module
        self._sampler = make_sampler(
            network, settings.steps, settings.guidance, settings.spacing, settings.scheduler
        )

    @torch.no_grad()
    def __call__(self, indices: Sequence[int]) -> tuple[list[str], Tensor, Tensor]:
        """Prompts, noise seeds (B,) int64 and unscaled latents (B, C, h, w) float32 of these pairs, on the CPU."""
        prompts = self.prompts.at(indices)
        seeds = noise_seeds(self.settings.seed, torch.tensor(indices, dtype=torch.int64))
        noise = pair_noise(seeds.to(self.device), self.family.latent_shape())
        latents = self._sampler(noise, self.family.encode_prompts(prompts))
        return prompts, seeds, self.family.unscale_latents(latents).cpu()
