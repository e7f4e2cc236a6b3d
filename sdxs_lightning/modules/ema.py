"""A moving average of the student's weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from sdxs_lightning.batch import Conditioning
from sdxs_lightning.modules.student_generator import StudentGenerator, one_step


class StudentEma(nn.Module):
    """Holds the averaged network, starting as a copy of the student's.

    ema <- decay * ema + (1 - decay) * student, once per *student* update: counting critic turns too would raise the
    decay to its r-th power. A registered submodule, so that a checkpoint holds it and FSDP2 can shard it.

    Args:
        student: a built student.
        decay: in [0, 1); 0 follows the student.

    Raises:
        ValueError: for another decay.
    """

    def __init__(self, student: StudentGenerator, decay: float) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {decay}; change model.init_args.ema_decay.")
        self.decay = decay
        self.conditioning_timestep = student.conditioning_timestep
        self.denoiser = copy.deepcopy(student.denoiser).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, student: StudentGenerator) -> None:
        """Moves the average towards the student; shard by shard where both are sharded."""
        averaged: list[Tensor] = list(self.parameters())
        current: list[Tensor] = list(student.denoiser.parameters())
        torch._foreach_lerp_(averaged, current, 1 - self.decay)

    def train(self, mode: bool = True) -> StudentEma:
        """Stays in eval mode whatever the composition is set to."""
        return super().train(False)

    def forward(self, noise: Tensor, conditioning: Conditioning) -> Tensor:
        """Noise (B, C, h, w) -> clean latents pred_x0 (B, C, h, w), float32."""
        return one_step(self.denoiser, noise, conditioning, self.conditioning_timestep)
