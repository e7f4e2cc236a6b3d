"""The networks that sample a set of pairs, one batch at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from data.prepare.pairs.pair_set import PairSet
from data.prepare.pairs.prompts import Prompts
from sdxs_lightning.core.frozen import Frozen
from sdxs_lightning.core.pair_noise import noise_seeds, pair_noise
from sdxs_lightning.families import Family
from sdxs_lightning.families.detect import detect_family
from sdxs_lightning.networks.denoiser import Denoiser
from sdxs_lightning.pairs.target_sampler import make_sampler


class PairSampler:
    """Samples the pairs of given indices; a function of the index.

    Args:
        pair_set: the set.
        prompts: of the set.
        device: of the networks.
    """

    def __init__(self, pair_set: PairSet, prompts: Prompts, device: torch.device) -> None:
        self.pair_set, self.prompts, self.device = pair_set, prompts, device
        dtype: torch.dtype = getattr(torch, pair_set.dtype)
        self.family: Family = detect_family(pair_set.model, pair_set.config).to(device, dtype)
        unet = self.family.load_unet(pair_set.unet, "--unet")
        denoiser = Denoiser(unet, self.family.schedule, self.family.prediction_type)
        network = Frozen(denoiser).to(device, dtype).module
        self._sampler = make_sampler(
            network, pair_set.steps, pair_set.guidance, pair_set.spacing, pair_set.scheduler
        )

    @torch.no_grad()
    def __call__(self, indices: Sequence[int]) -> tuple[list[str], Tensor, Tensor]:
        """Prompts, noise seeds (B,) int64 and unscaled latents (B, C, h, w) float32 of these pairs, on the CPU."""
        prompts = self.prompts.at(indices)
        seeds = noise_seeds(self.pair_set.seed, torch.tensor(indices, dtype=torch.int64))
        noise = pair_noise(seeds.to(self.device), self.family.latent_shape())
        latents = self._sampler(noise, self.family.encode_prompts(prompts))
        return prompts, seeds, self.family.unscale_latents(latents).cpu()
