"""Moving averages of weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sdxs_lightning.core.batch import Conditioning
from sdxs_lightning.networks.adapter_views import AveragedView
from sdxs_lightning.networks.backward_simulation import sample_in_steps
from sdxs_lightning.networks.denoiser import Denoiser
from sdxs_lightning.networks.lora import lora_parameters
from sdxs_lightning.networks.student_generator import StudentGenerator


class DenoiserEma(nn.Module):
    """Holds an averaged network, starting as a copy of the one that learns.

    ema <- decay * ema + (1 - decay) * weights, once per step of its optimizer. A registered submodule, so that a
    checkpoint holds it and FSDP2 can shard it. Of a network with adapters only these are averaged; its frozen weights stay
    in memory once.

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
        adapted = bool(lora_parameters(denoiser))
        self.denoiser: Denoiser = AveragedView(denoiser) if adapted else copy.deepcopy(denoiser)
        self.denoiser.eval().requires_grad_(False)

    @torch.no_grad()
    def follow(self, denoiser: Denoiser) -> None:
        """Moves the average towards the network; shard by shard where both are sharded."""
        averaged: list[Tensor] = list(self.parameters())
        current: list[Tensor] = list(
            (lora_parameters(denoiser) or dict(denoiser.named_parameters())).values()
        )
        torch._foreach_lerp_(averaged, current, 1 - self.decay)

    def after_sharding(self) -> None:
        """Averaged adapters begin at the shards of the adapters, once these are sharded; a full copy is sharded itself."""
        if isinstance(self.denoiser, AveragedView):
            self.denoiser.restart()

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, `denoiser.unet` has the averaged weights, for whoever reads them off the U-Net."""
        if isinstance(self.denoiser, AveragedView):
            with self.denoiser.applied():
                yield
        else:
            yield

    def train(self, mode: bool = True) -> DenoiserEma:
        """Stays in eval mode whatever the composition is set to."""
        return super().train(False)


class StudentEma(DenoiserEma):
    """The averaged student; it generates as the student does.

    Updated once per *student* update: counting every iteration would raise the decay to its r-th power.

    Args:
        student: a built student.
        decay: in [0, 1); 0 follows the student.

    Raises:
        ValueError: for another decay.
    """

    def __init__(self, student: StudentGenerator, decay: float) -> None:
        super().__init__(student.denoiser, decay)
        self.conditioning_timestep, self.timesteps = student.conditioning_timestep, student.timesteps

    def update(self, student: StudentGenerator) -> None:
        """Moves the average towards the student."""
        self.follow(student.denoiser)

    def forward(self, noise: Tensor, conditioning: Conditioning) -> Tensor:
        """Noise (B, C, h, w) -> clean latents pred_x0 (B, C, h, w), float32."""
        return sample_in_steps(self.denoiser, noise, conditioning, self.timesteps)
