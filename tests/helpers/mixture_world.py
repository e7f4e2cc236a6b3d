"""Eight Gaussians on a ring, as latents of 2 x 1 x 1: small enough to distil in seconds, hard enough to get wrong.

The base is exact: its U-Net says the mixture's own noise prediction. The networks that learn, `weights="smooth"`, start at that
of one Gaussian of the same variance: a fake score that started at the mixture's would first have to unlearn its modes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import torch
from diffusers.configuration_utils import FrozenDict
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from sdxs_lightning.core.batch import Conditioning, TrainingBatch
from sdxs_lightning.core.noise_schedule import NoiseSchedule, PredictionType
from sdxs_lightning.core.seeding import Stream, integers, normal
from sdxs_lightning.families import Family
from sdxs_lightning.stages.distillation.step import OneStepDistillation

MODES, RADIUS, STD, WIDTH = 8, 1.4, 0.15, 128
SHAPE = (2, 1, 1)
_ANGLES = torch.arange(MODES) * (2 * math.pi / MODES)
CENTRES = RADIUS * torch.stack([_ANGLES.cos(), _ANGLES.sin()], dim=1)


def data(positions: Tensor) -> Tensor:
    """Exact samples of the mixture, (B, 2, 1, 1)."""
    mode = integers(0, Stream.TEACHER_TIMESTEP, positions, 0, MODES)
    points = CENTRES[mode] + STD * normal(0, Stream.TEACHER_NOISE, positions, (2,))
    return points.view(-1, *SHAPE)


class Waves(nn.Module):
    """Sines and cosines of the points, in random directions, into a linear layer.

    An MLP of bare coordinates learns a ring in seconds and its eight modes in minutes: it is slow at high frequencies.
    """

    directions: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("directions", 2.0 * torch.randn(2, WIDTH // 2))
        self.linear = nn.Linear(2 + WIDTH, WIDTH)

    def forward(self, points: Tensor) -> Tensor:
        angles = points @ self.directions
        return cast(Tensor, self.linear(torch.cat([points, angles.sin(), angles.cos()], dim=1)))


class MixtureUnet(nn.Module):
    """An exact noise prediction plus a small network that starts at zero, put together like a diffusers U-Net.

    Args:
        schedule: of the family.
        modes: whether the exact part is the mixture's; else one Gaussian's, N(0, 1), whose noise prediction is sigma_t x_t.
    """

    def __init__(self, schedule: NoiseSchedule, modes: bool) -> None:
        super().__init__()
        self.schedule, self.modes = schedule, modes
        self.config = FrozenDict(block_out_channels=(WIDTH,))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.conv_in, self.time = Waves(), nn.Linear(8, WIDTH)
            self.down_blocks = nn.ModuleList([nn.Identity()])
            self.mid_block = nn.Sequential(
                nn.SiLU(),
                nn.Linear(WIDTH, WIDTH),
                nn.SiLU(),
                nn.Linear(WIDTH, WIDTH),
                nn.Unflatten(1, (WIDTH, 1, 1)),
            )
            self.up_blocks = nn.ModuleList([nn.Flatten(), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU()])
            self.conv_out = nn.Linear(WIDTH, 2)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> SimpleNamespace:
        angles = timestep.float()[:, None] / 1000 * math.pi * torch.tensor([0.5, 1.0, 2.0, 4.0])
        time = self.time(torch.cat([angles.cos(), angles.sin()], dim=1))
        hidden = self.mid_block(self.conv_in(sample.flatten(1)) + time)
        for block in self.up_blocks:
            hidden = block(hidden)
        hidden = self.conv_out(hidden)
        # Without up blocks this is the encoder's view of the network: features, not noise.
        if len(self.up_blocks):
            exact = self._exact(sample, timestep) if self.modes else self.schedule.sigma_t(timestep) * sample
            hidden = exact + hidden.view(-1, *SHAPE)
        return SimpleNamespace(sample=hidden)

    def _exact(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """-sigma_t times the score: away from the centres, weighed by how likely each made x_t."""
        alpha, sigma = (
            self.schedule.alpha_t(timestep).view(-1, 1, 1),
            self.schedule.sigma_t(timestep).view(-1, 1, 1),
        )
        variance = (alpha * STD) ** 2 + sigma**2
        away = sample.view(-1, 1, 2) - alpha * CENTRES
        weights = torch.softmax(-(away**2).sum(2, keepdim=True) / (2 * variance), dim=1)
        return (sigma / variance * (weights * away).sum(1, keepdim=True)).view(-1, *SHAPE)


class MixtureFamily:
    """What the stage asks of a base; there is one prompt, and it says nothing."""

    prediction_type: PredictionType = "epsilon"

    def __init__(self, conditioning_timestep: int = 399) -> None:
        self.conditioning_timestep = conditioning_timestep
        self.schedule = NoiseSchedule.scaled_linear()

    def latent_shape(self, resolution: int | None = None) -> tuple[int, int, int]:
        return SHAPE

    def scale_latents(self, latents: Tensor) -> Tensor:
        return latents

    def load_unet(self, folder: str | None = None, option: str = "weights") -> MixtureUnet:
        return MixtureUnet(self.schedule, modes=folder is None)

    def encode_prompts(self, captions: list[str], *_: Any) -> Conditioning:
        return Conditioning(prompt_embeds=torch.zeros(len(captions), 1, 1))

    def to(self, *_: Any) -> None:
        """Everything is where it is needed."""


def family(conditioning_timestep: int = 399) -> Family:
    return cast(Family, MixtureFamily(conditioning_timestep))


class Batches(IterableDataset[TrainingBatch]):
    """Endless batches of the mixture."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[TrainingBatch]:
        positions = torch.arange(self.batch_size)
        nothing = [""] * self.batch_size
        while True:
            yield TrainingBatch(
                captions=nothing, positions=positions, sample_ids=nothing, latents=data(positions)
            )
            positions = positions + self.batch_size


def distil(module: OneStepDistillation, batch_size: int) -> None:
    """Runs the stage to its end, with the real Trainer."""
    # Eleven scalars an iteration would cost as much as the networks here.
    module.log_dict = lambda *_, **__: None  # type: ignore[method-assign]
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, DataLoader(Batches(batch_size), batch_size=None))


def mmd(first: Tensor, second: Tensor) -> float:
    """Unbiased squared maximum mean discrepancy; a sum of Gaussian kernels, as wide as a mode and as the ring.

    Source: Gretton et al., "A kernel two-sample test", JMLR 2012, eq. 3.
    """

    widths = (0.15, 0.5, 1.5)

    def similarity(x: Tensor, y: Tensor) -> Tensor:
        square = torch.cdist(x, y).square()
        return torch.stack([torch.exp(-square / (2 * width**2)).sum() for width in widths]).sum()

    x, y = first.flatten(1), second.flatten(1)
    n, m = len(x), len(y)
    # A point is as similar to itself as can be, len(widths); the unbiased estimate leaves that out.
    within_x = (similarity(x, x) - n * len(widths)) / (n * (n - 1))
    within_y = (similarity(y, y) - m * len(widths)) / (m * (m - 1))
    return (within_x + within_y - 2 * similarity(x, y) / (n * m)).item()


def mode_shares(points: Tensor) -> Tensor:
    """Share of the points that lie within three standard deviations of each centre, (8,)."""
    return (torch.cdist(points.flatten(1), CENTRES) < 3 * STD).float().mean(0)


def nearest_mode(points: Tensor) -> Tensor:
    """Index of the nearest centre, (B,)."""
    return torch.cdist(points.flatten(1), CENTRES).argmin(1)
