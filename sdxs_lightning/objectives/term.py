"""Interface between the training step and the terms of the student's loss, and the gradients of several terms.

A *term* is one summand of the student's loss. It declares what it needs; the stage provides it or rejects the configuration.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sdxs_lightning.core.batch import Conditioning
from sdxs_lightning.core.noise_schedule import NoiseSchedule, add_noise
from sdxs_lightning.core.seeding import Stream, normal
from sdxs_lightning.core.timesteps import TimestepRange

if TYPE_CHECKING:
    from sdxs_lightning.families import Family
    from sdxs_lightning.networks.denoiser import Denoiser
    from sdxs_lightning.networks.discriminator import Discriminator
    from sdxs_lightning.networks.fake_score import FakeScore

Phase = Literal["warmup", "distillation", "always"]
"""When a term acts: during the first `update_schedule.warmup_updates` student updates, after them, or always."""
Scalars = Mapping[str, Tensor]
Gradients = dict[str, Tensor]
"""Gradients at the student's latents, (B, C, h, w), float32, by term."""


class NoisyLatents(NamedTuple):
    """Latents after forward diffusion."""

    latents: Tensor
    """(B, C, h, w), float32: alpha_t * clean + sigma_t * noise."""
    timesteps: Tensor
    """(B,), int64."""
    noise: Tensor
    """(B, C, h, w), float32."""


@dataclass(frozen=True, eq=False, kw_only=True)
class LatentSample:
    """Clean latents with their prompts, and the keys of their random numbers."""

    latents: Tensor
    """(B, C, h, w), float32, scaled: pred_x0 of the student, or data."""
    conditioning: Conditioning
    """Conditioning of the same B samples."""
    positions: Tensor
    """(B,), int64, positions in the run; with the seed they determine every random number of the step."""
    seed: int
    """Seed of the run."""
    target: Tensor | None = None
    """(B, C, h, w), float32: the target sampler's latents for the same noise and prompts; for terms with `needs_pairs`. Of the
    samples that are from pairs only, if `pairs_every_nth` is above 1."""
    pairs_every_nth: int = 1
    """Every n-th of the samples is from a pair, from the first on."""
    images: Tensor | None = None
    """(B, 3, H, W), float32, in [-1, 1]: the batch's images, for terms with `needs_images`. If the sample comes from a pair,
    they belong to other prompts."""
    use: int = 0
    """How often the sample has been used for an update of the fake score; each use draws its own noise and timesteps."""

    def detach(self) -> LatentSample:
        """Returns the sample detached from the student's graph."""
        return replace(self, latents=self.latents.detach())

    def guidance_scale(self, default: float) -> float | Tensor:
        """Guidance scales of the samples, (B, 1, 1, 1), if the student has them as an input; else the default. A default of 1
        stays: that term does not guide.
        """
        return default if default == 1.0 else self.conditioning.guidance_scale(default)

    def every(self, nth: int) -> LatentSample:
        """Returns every n-th sample of the batch."""
        if nth == 1:
            return self
        some = slice(None, None, nth)
        common = math.gcd(nth, self.pairs_every_nth)
        return replace(
            self,
            latents=self.latents[some],
            conditioning=self.conditioning[some],
            positions=self.positions[some],
            target=None if self.target is None else self.target[:: nth // common],
            pairs_every_nth=self.pairs_every_nth // common,
            images=None if self.images is None else self.images[some],
        )

    def of_pairs(self) -> LatentSample:
        """Returns the samples that are from pairs."""
        return self.every(self.pairs_every_nth)

    def used(self, times: int) -> LatentSample:
        """Returns the sample for its use of this number, counted from 0."""
        return replace(self, use=times)

    @property
    def drawing_seed(self) -> int:
        """Seed of what is drawn for this use of the sample."""
        return self.seed + (self.use << 40)  # no run's seed

    def renoise(
        self, schedule: NoiseSchedule, timesteps: TimestepRange, timestep_stream: Stream, noise_stream: Stream
    ) -> NoisyLatents:
        """Forward diffusion to a random timestep per sample; differentiable in `latents`.

        Raises:
            ValueError: for timesteps that the schedule does not have.
        """
        timesteps.check(schedule.num_train_timesteps)
        drawn = timesteps.draw(self.drawing_seed, timestep_stream, self.positions)
        noise = normal(self.drawing_seed, noise_stream, self.positions, tuple(self.latents.shape[1:]))
        return NoisyLatents(add_noise(self.latents, noise, drawn, schedule), drawn, noise)


class DistillationContext(NamedTuple):
    """What a term may use besides the sample: the stage's networks, the noise schedule, the run's progress."""

    schedule: NoiseSchedule
    fake_score: FakeScore | None
    """None if the run ends with the warm-up."""
    real_score: Denoiser | None
    """The frozen base; None if no term needs it."""
    discriminator: Discriminator | None
    """The discriminator on latents; None without one, or if the GAN compares images."""
    progress: float = 0.0
    """Completed share of the student updates after the warm-up, for ramps."""


class Balance(NamedTuple):
    """Scaling of a term's gradient to a norm relative to another term's."""

    reference: str
    """Name of the other term."""
    ratio: float
    """Norm of this term's gradient relative to the reference's, both at the student's latents."""


class ObjectiveSettings:
    """Base class of objective settings, which are frozen dataclasses, for settings that are not themselves a term.

    Not a dataclass: jsonargparse accepts subclasses by `class_path` only if some class of the MRO is not one. Modules with
    extensible subclasses must not use `from __future__ import annotations`: jsonargparse (4.53) evaluates the annotations of
    all bases in the module of the configured class.
    """


class StudentTerm:
    """Base class of the terms of the student's loss.

    The fields of a derived frozen dataclass are options in YAML. Not a dataclass itself, for the reason in `ObjectiveSettings`.
    """

    phase: str = "distillation"
    """A `Phase`; annotated as a builtin type for the reason in `ObjectiveSettings`."""
    needs_pairs: bool = False
    """Whether the term reads `sample.target`; the sample is then made from a pair's noise and prompts."""
    needs_real_score: bool = False
    """Whether the term calls `context.real_score`."""
    needs_fake_score: bool = False
    """Whether the term calls `context.fake_score`, which passes gradients on but accumulates none."""
    needs_images: bool = False
    """Whether the term reads `sample.images`."""
    needs_discriminator: bool = False
    """Whether the term calls `context.discriminator`."""

    def build(self, family: Family, context: DistillationContext) -> None:
        """Loads the term's own frozen networks; called in `configure_model`. Idempotent."""

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Moves the term's own frozen networks; `dtype` is the real score's."""

    def frozen_networks(self) -> dict[str, nn.Module]:
        """The term's own frozen networks by name, for the memory plan."""
        return {}

    def balance(self, progress: float) -> Balance | None:
        """How the gradient is scaled; None does not scale it.

        Args:
            progress: as in `DistillationContext`.
        """
        return None

    def __call__(self, sample: LatentSample, context: DistillationContext) -> tuple[Tensor, Scalars]:
        """Returns the weighted loss, (), and scalars for the log, which get the prefix `student/`."""
        raise NotImplementedError


def term_gradients(
    terms: Mapping[str, StudentTerm], sample: LatentSample, context: DistillationContext
) -> tuple[Gradients, dict[str, Tensor]]:
    """Computes the balanced gradient of each weighted term at the sample's latents, and the terms' scalars.

    Args:
        terms: the terms by name.
        sample: its latents require gradients; the student's graph behind them is not traversed.
        context: its networks should not require gradients, so that they accumulate none.
    """
    gradients: Gradients = {}
    scalars: dict[str, Tensor] = {}
    for name, term in terms.items():
        loss, named = term(sample.of_pairs() if term.needs_pairs else sample, context)
        (gradients[name],) = torch.autograd.grad(loss, sample.latents)
        scalars.update(named)
    for name, term in terms.items():
        balance = term.balance(context.progress)
        if balance is not None:
            gradients = balanced(gradients, name, balance)
    return gradients, scalars


def balanced(gradients: Gradients, name: str, balance: Balance) -> Gradients:
    """Scales one gradient so that its norm is `ratio` times the reference's, over the batches of all ranks.

    Does not synchronise with the device.

    Args:
        gradients: gradients by term.
        name: the term whose gradient is scaled.
        balance: reference and ratio.

    Returns:
        A new dict.
    """
    squares = torch.stack([gradients[key].float().square().sum() for key in (balance.reference, name)])
    if dist.is_initialized():  # else the scale would depend on how the batch is split over ranks
        dist.all_reduce(squares)
    wanted, found = squares.sqrt()
    return gradients | {name: gradients[name] * (balance.ratio * wanted / found.clamp_min(1e-12))}


def compare_gradients(gradients: Gradients) -> dict[str, Tensor]:
    """Norms and pairwise cosines of this rank's gradients: `gradient_norm_A`, `cosine_A_B`."""
    flat = {name: gradient.float().flatten() for name, gradient in gradients.items()}
    norms = {name: gradient.norm() for name, gradient in flat.items()}
    compared = {f"gradient_norm_{name}": norm for name, norm in norms.items()}
    for one, other in combinations(flat, 2):
        both = (norms[one] * norms[other]).clamp_min(1e-20)
        compared[f"cosine_{one}_{other}"] = torch.dot(flat[one], flat[other]) / both
    return compared
