"""Exponential moving averages of weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sdxs_lightning.core.batch import Conditioning
from sdxs_lightning.networks.adapter_views import AveragedView
from sdxs_lightning.networks.backward_simulation import sample_in_steps
from sdxs_lightning.networks.denoiser import Denoiser
from sdxs_lightning.networks.lora import lora_parameters
from sdxs_lightning.networks.network import save_without
from sdxs_lightning.networks.student_generator import StudentGenerator


def check_decay(decay: float) -> None:
    """Raises ValueError for a decay with which an average would never move, or not be one."""
    if not 0 <= decay < 1:
        raise ValueError(f"ema_decay must be in [0, 1), got {decay}; change model.init_args.ema_decay.")


class DenoiserEma(nn.Module):
    """Exponential moving average of a denoiser, initialised as a copy of it.

    ema <- decay * ema + (1 - decay) * weights, once per optimizer step. A registered submodule, so that checkpoints include
    it and FSDP2 can shard it. In a network with adapters only what is trained is averaged; the frozen weights are shared, and
    in no checkpoint.

    Args:
        denoiser: the trained network.
        decay: in [0, 1); 0 copies the weights.

    Raises:
        ValueError: if decay is out of range.
    """

    def __init__(self, denoiser: Denoiser, decay: float) -> None:
        super().__init__()
        check_decay(decay)
        self.decay = decay
        adapted = bool(lora_parameters(denoiser.unet))
        self.denoiser: Denoiser = AveragedView(denoiser) if adapted else denoiser.copy_for_average()
        frozen = {name for name, parameter in denoiser.named_parameters() if not parameter.requires_grad}
        self.denoiser.eval().requires_grad_(False)
        own = [name for name, _ in self.denoiser.named_parameters()]
        self._averaged = [name for name in own if name not in frozen]
        save_without(self, [f"denoiser.{name}" for name in own if name in frozen])

    @torch.no_grad()
    def follow(self, denoiser: Denoiser) -> None:
        """Updates the average; works on local shards if both networks are sharded."""
        own, others = dict(self.denoiser.named_parameters()), dict(denoiser.named_parameters())
        averaged: list[Tensor] = [own[name] for name in self._averaged]
        if isinstance(self.denoiser, AveragedView):
            current: list[Tensor] = list(lora_parameters(denoiser).values())
        else:
            current = [others[name] for name in self._averaged]
        torch._foreach_lerp_(averaged, current, 1 - self.decay)

    def after_sharding(self) -> None:
        """Resets averaged adapters to the now sharded adapters; a full copy was sharded with the other networks."""
        if isinstance(self.denoiser, AveragedView):
            self.denoiser.restart()

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Context in which `denoiser.unet` holds the averaged weights."""
        if isinstance(self.denoiser, AveragedView):
            with self.denoiser.applied():
                yield
        else:
            yield

    def train(self, mode: bool = True) -> DenoiserEma:
        """Stays in eval mode when the stage calls `train()`."""
        return super().train(False)


class StudentEma(DenoiserEma):
    """Exponential moving average of the student; generates like the student.

    Updated once per *student* update: counting every iteration would raise the decay to its r-th power.

    Args:
        student: a built student.
        decay: in [0, 1); 0 copies the weights.

    Raises:
        ValueError: if decay is out of range.
    """

    def __init__(self, student: StudentGenerator, decay: float) -> None:
        super().__init__(student.denoiser, decay)
        self.conditioning_timestep, self.timesteps = student.conditioning_timestep, student.timesteps

    def update(self, student: StudentGenerator) -> None:
        """Updates the average."""
        self.follow(student.denoiser)

    def forward(self, noise: Tensor, conditioning: Conditioning) -> Tensor:
        """Maps noise (B, C, h, w) to clean latents pred_x0 (B, C, h, w), float32."""
        return sample_in_steps(self.denoiser, noise, conditioning, self.timesteps)
