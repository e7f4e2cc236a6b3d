"""Moving averages of weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from sdxs_lightning.batch import Conditioning
from sdxs_lightning.modules.student_generator import StudentGenerator, one_step
from sdxs_lightning.teacher.denoiser import Denoiser


class DenoiserEma(nn.Module):
    """Holds an averaged network, starting as a copy of the one that learns.

    ema <- decay * ema + (1 - decay) * weights, once per step of its optimizer. A registered submodule, so that a
    checkpoint holds it and FSDP2 can shard it.

    Args:
        denoiser: the network that learns.
        decay: in [0, 1); 0 follows it.

    Raises:
        ValueError: for another decay.
    """

    def __init__(self, denoiser: Denoiser, decay: float) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {decay}; change model.init_args.ema_decay.")
        self.decay = decay
        self.denoiser = copy.deepcopy(denoiser).eval().requires_grad_(False)

    @torch.no_grad()
    def follow(self, denoiser: Denoiser) -> None:
        """Moves the average towards the network; shard by shard where both are sharded."""
        averaged: list[Tensor] = list(self.parameters())
        current: list[Tensor] = list(denoiser.parameters())
        torch._foreach_lerp_(averaged, current, 1 - self.decay)

    def train(self, mode: bool = True) -> DenoiserEma:
        """Stays in eval mode whatever the composition is set to."""
        return super().train(False)


class StudentEma(DenoiserEma):
    """The averaged one-step student; it generates as the student does.

    Updated once per *student* update: counting critic turns too would raise the decay to its r-th power.

    Args:
        student: a built student.
        decay: in [0, 1); 0 follows the student.

    Raises:
        ValueError: for another decay.
    """

    def __init__(self, student: StudentGenerator, decay: float) -> None:
        super().__init__(student.denoiser, decay)
        self.conditioning_timestep = student.conditioning_timestep

    def update(self, student: StudentGenerator) -> None:
        """Moves the average towards the student."""
        self.follow(student.denoiser)

    def forward(self, noise: Tensor, conditioning: Conditioning) -> Tensor:
        """Noise (B, C, h, w) -> clean latents pred_x0 (B, C, h, w), float32."""
        return one_step(self.denoiser, noise, conditioning, self.conditioning_timestep)
