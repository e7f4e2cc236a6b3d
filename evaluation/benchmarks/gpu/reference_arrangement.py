"""DMD2's iteration as its paper and released code arrange the work, reimplemented from that description.

Student and fake score run in float32 outside autocast, the text encoder in float32 and twice, the score difference in float64,
real and fake samples go through the fake score's encoder one after the other and apart from the denoising pass; the frozen real
score alone runs in bfloat16. What it computes is what our stage computes; see METHOD in the paper's appendix for the losses.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from evaluation.benchmarks.gpu.random_base import RandomBase
from sdxs_lightning.core.batch import Conditioning
from sdxs_lightning.core.noise_schedule import add_noise
from sdxs_lightning.families import Family
from sdxs_lightning.networks.denoiser import Denoiser
from sdxs_lightning.networks.discriminator import Discriminator
from sdxs_lightning.networks.feature_taps import bottleneck_shape


class ReferenceArrangement:
    """Networks and optimizers of one run.

    Args:
        family: a base with random weights.
        guidance_scale: of the real score.
        device: where it runs.
    """

    def __init__(self, family: RandomBase, guidance_scale: float, device: torch.device) -> None:
        def denoiser() -> Denoiser:
            return Denoiser(family.load_unet().train(), family.schedule, family.prediction_type)

        self.family, self.guidance_scale, self.device = family, guidance_scale, device
        family.to(device, torch.float32)
        self.student, self.fake, self.real = denoiser(), denoiser(), denoiser()
        self.real.requires_grad_(False)
        self.head = Discriminator(torch.optim.AdamW)
        self.head.build(bottleneck_shape(self.fake.unet, family.latent_shape()))
        self.head.to(device)
        self.student_optimizer = torch.optim.AdamW(self.student.parameters(), lr=1e-6)
        fake_score_and_head = [*self.fake.parameters(), *self.head.parameters()]
        self.fake_optimizer = torch.optim.AdamW(fake_score_and_head, lr=1e-6)

    def iterate(self, data: Tensor, student: bool) -> None:
        """One iteration on a batch of latents, (B, 4, h, w), with or without a student update."""
        self._encode(
            len(data)
        )  # for the generator and for the guidance; the released code encodes both in float32
        prompts = self._encode(len(data))
        with torch.set_grad_enabled(student):
            latents = self._generate(prompts, data)
        if student:
            self.head.requires_grad_(False)
            self.fake.requires_grad_(False)
            loss = self._distribution_matching(latents, prompts)
            loss = loss + 1e-3 * softplus(-self._logits(latents, prompts)).mean()
            loss.backward()
            self._step(self.student, self.student_optimizer)
            self.head.requires_grad_(True)
            self.fake.requires_grad_(True)
        latents = latents.detach()
        noise, noisy, timesteps = self._renoise(latents)
        loss = (self.fake(noisy, timesteps, prompts).noise_pred - noise).square().mean()
        real_logits, fake_logits = self._logits(data, prompts), self._logits(latents, prompts)
        loss = loss + 1e-2 * (softplus(-real_logits) + softplus(fake_logits)).mean()
        loss.backward()
        self._step(self.fake, self.fake_optimizer)

    def _encode(self, count: int) -> Conditioning:
        return self.family.encode_prompts([""] * count)

    def _generate(self, prompts: Conditioning, like: Tensor) -> Tensor:
        timesteps = torch.full(
            (len(like),), cast(Family, self.family).conditioning_timestep, device=self.device
        )
        return cast(Tensor, self.student(torch.randn_like(like), timesteps, prompts).pred_x0)

    def _distribution_matching(self, latents: Tensor, prompts: Conditioning) -> Tensor:
        with torch.no_grad():
            _, noisy, timesteps = self._renoise(latents)
            fake = self.fake(noisy, timesteps, prompts).pred_x0.double()
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                real = self.real.guided(noisy, timesteps, prompts, self.guidance_scale).pred_x0.double()
            x = latents.double()
            gradient = torch.nan_to_num((fake - real) / (x - real).abs().mean((1, 2, 3), keepdim=True))
        return 0.5 * (latents.double() - (x - gradient)).square().mean()

    def _logits(self, latents: Tensor, prompts: Conditioning) -> Tensor:
        _, noisy, timesteps = self._renoise(latents)
        return cast(Tensor, self.head(self.fake.features(noisy, timesteps, prompts)))

    def _renoise(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        noise = torch.randn_like(latents)
        timesteps = torch.randint(20, 980, (len(latents),), device=self.device)
        return noise, add_noise(latents, noise, timesteps, self.family.schedule), timesteps

    def _step(self, network: nn.Module, optimizer: Any) -> None:
        nn.utils.clip_grad_norm_(network.parameters(), 10.0)
        optimizer.step()
        optimizer.zero_grad()
