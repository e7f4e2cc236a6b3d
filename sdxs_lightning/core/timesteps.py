"""Timestep ranges for training, and timesteps of few-step samplers."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from sdxs_lightning.core.seeding import integers

Spacing = Literal["trailing", "leading"]


@dataclass(frozen=True)
class TimestepRange:
    """A range of timesteps, both ends included, drawn from uniformly."""

    low: int = 20
    """Smallest timestep; 0 is almost clean."""
    high: int = 980
    """Largest timestep; 999 is almost noise."""

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high:
            raise ValueError(
                f"a timestep range needs 0 <= low <= high, got low {self.low} and high {self.high}; change "
                "`timesteps` of the objective."
            )

    def check(self, total: int, name: str = "a timestep range") -> None:
        """Raises ValueError if the range leaves a noise schedule of `total` timesteps."""
        if self.high >= total:
            raise ValueError(
                f"{name} must be in [0, {total - 1}], the base's timesteps, got low {self.low} and high {self.high}."
            )

    def contains(self, timesteps: Tensor) -> Tensor:
        """Whether each timestep is in the range: bool, of the shape of timesteps."""
        return (timesteps >= self.low) & (timesteps <= self.high)

    def draw(self, seed: int, stream: int, positions: Tensor) -> Tensor:
        """Draws one timestep per sample.

        Args:
            seed: the run's seed.
            stream: a `seeding.Stream`.
            positions: (B,), int64, global positions of the samples.

        Returns:
            (B,), int64, in [low, high], on the device of positions.
        """
        return integers(seed, stream, positions, self.low, self.high + 1)


def few_step_timesteps(
    steps: int, num_train_timesteps: int = 1000, spacing: Spacing = "trailing", steps_offset: int = 0
) -> list[int]:
    """The timesteps that a sampler with `steps` steps visits, from noise to clean.

    "trailing" starts at the last timestep, so one step starts at 999; "leading", as in the scheduler configs of SD-1.5 and
    SDXL, starts one spacing earlier and omits the noisiest part.

    Args:
        steps: number of network calls, in [1, num_train_timesteps].
        num_train_timesteps: T.
        spacing: diffusers' `timestep_spacing`.
        steps_offset: added to "leading" timesteps only; 1 in the configs of Stable Diffusion.

    Returns:
        `steps` ints, decreasing; a list, so that looping over them does not synchronise with the device.

    Raises:
        ValueError: if the steps or the offset leave [0, T), or the spacing is unknown.

    Source: arXiv:2305.08891, table 2; equals DDIMScheduler.set_timesteps of diffusers.
    """
    if not 1 <= steps <= num_train_timesteps:
        raise ValueError(f"steps must be in [1, {num_train_timesteps}], got {steps}.")
    match spacing:
        case "trailing":
            # numpy rounds halves to even, as diffusers does; that decides e.g. 1000 / 16.
            visited = np.round(num_train_timesteps - np.arange(steps) * (num_train_timesteps / steps)) - 1
        case "leading":
            visited = np.arange(steps)[::-1] * (num_train_timesteps // steps) + steps_offset
        case _:
            raise ValueError(f"spacing {spacing!r} is not known; accepted are trailing and leading.")
    timesteps = [int(timestep) for timestep in visited]
    if timesteps[0] >= num_train_timesteps or timesteps[-1] < 0:
        raise ValueError(
            f"{steps} steps with spacing {spacing} and steps_offset {steps_offset} visit timestep "
            f"{timesteps[0]}, outside [0, {num_train_timesteps - 1}]; take fewer steps or another offset."
        )
    return timesteps
