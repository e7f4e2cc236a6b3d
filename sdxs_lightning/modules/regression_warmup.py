"""The optional warm-up: regression on (noise, latents) pairs of the target sampler, made when the fit starts.

TOY_FACTS and DMD2's SDXL recipe agree that a short regression before distribution matching is the cheapest gain of all.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Protocol, runtime_checkable

import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from sdxs_lightning.batch import Conditioning
from sdxs_lightning.families import Family
from sdxs_lightning.objectives.regression import Regression
from sdxs_lightning.seeding import Stream, integers, normal
from sdxs_lightning.teacher.denoiser import Denoiser
from sdxs_lightning.teacher.target_sampler import TargetSampler
from sdxs_lightning.timesteps import Spacing


@runtime_checkable
class CaptionSource(Protocol):
    """A DataModule that can name prompts of the training split, always the same ones."""

    def train_captions(self, count: int) -> list[str]:
        """The first `count` captions in stored order, or all if there are fewer."""


@dataclass(frozen=True)
class RegressionWarmup:
    """How the pairs are made; how long they are trained on is `curriculum.warmup_updates`."""

    pairs: int = 2048
    """Number of pairs; each costs `sampler_steps` guided calls of the real score."""
    sampler_steps: int = 15
    """Steps of the target sampler."""
    guidance_scale: float = 3.0
    """Guidance of the target sampler; 1 means none."""
    spacing: Spacing = "trailing"
    """Timesteps of the target sampler; "trailing" begins where the student's noise is."""
    sampler_batch_size: int = 64
    """Pairs that are sampled at once, on each device."""
    objective: Regression = Regression()
    """How the student's latents are compared with a pair's."""

    def __post_init__(self) -> None:
        for name in ("pairs", "sampler_steps", "sampler_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"warmup.{name} must be 1 or more, got {getattr(self, name)}.")


class WarmupPairs:
    """Pairs in memory: prompts and target latents; the noise is made anew from each pair's index.

    Prompt embeddings stay on the device, so that a batch is picked there without waiting for it: 2048 pairs are 0.5 GB
    for SD in float32.

    Args:
        conditioning: of n prompts.
        targets: (n, C, h, w), scaled latents.
        seed: of the run.
    """

    def __init__(self, conditioning: Conditioning, targets: Tensor, seed: int) -> None:
        self.conditioning = conditioning
        self.targets = targets
        self._seed = seed

    def __len__(self) -> int:
        return len(self.targets)

    def pick(self, positions: Tensor) -> tuple[Tensor, Conditioning, Tensor]:
        """The pairs that stand at these positions of the run: noise, conditioning, targets."""
        # Drawn with replacement: a function of the position alone needs no state of a shuffle. The stream is the one that
        # would make the student's noise at these positions, which the pair brings along here.
        chosen = integers(self._seed, Stream.STUDENT_NOISE, positions, 0, len(self))
        noise = normal(self._seed, Stream.PAIRS, chosen, tuple(self.targets.shape[1:]))
        return noise, _rows(self.conditioning, chosen), self.targets[chosen]


@torch.no_grad()
def make_pairs(
    settings: RegressionWarmup, captions: list[str], family: Family, real_score: Denoiser, seed: int
) -> WarmupPairs:
    """Samples the target of every caption; ranks share the work and each gets all pairs.

    Args:
        settings: how many, and how they are sampled.
        captions: prompts; used again from the start when there are fewer than pairs.
        family: encodes them.
        real_score: the network of the target sampler.
        seed: of the run; with a pair's index it determines the pair's noise.

    Returns:
        The same pairs on every rank, and after a resume.

    Raises:
        ValueError: without captions.
    """
    if not captions:
        raise ValueError("the warm-up needs captions and the training data has none.")
    sampler = TargetSampler(real_score, settings.sampler_steps, settings.guidance_scale, settings.spacing)
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    # Rounded up to whole batches on every rank: a sharded real score needs all ranks in every call.
    share = -(-settings.pairs // world_size)
    batches = []
    for start in range(0, share, settings.sampler_batch_size):
        count = min(settings.sampler_batch_size, share - start)
        index = torch.arange(
            rank * share + start, rank * share + start + count, device=family.schedule.alpha.device
        )
        prompts = [captions[i % len(captions)] for i in index.tolist()]
        noise = normal(seed, Stream.PAIRS, index, family.latent_shape())
        batches.append(sampler(noise, family.encode_prompts(prompts)))
        if len(batches) % 4 == 0:
            rank_zero_info(f"pairs: {world_size * (start + count)} of {world_size * share}")
    targets = _gather(torch.cat(batches), world_size)[: settings.pairs]
    prompts = [captions[i % len(captions)] for i in range(settings.pairs)]
    return WarmupPairs(_encode(family, prompts, settings.sampler_batch_size), targets, seed)


@torch.no_grad()
def planned_pairs(settings: RegressionWarmup, family: Family, real_score: Denoiser) -> WarmupPairs:
    """What `make_pairs` holds, and at most holds for a moment, for the memory plan: one step of its sampler.

    Args:
        settings: how many pairs, and how many are sampled at once.
        family: one without weights.
        real_score: of the meta device.
    """
    device = family.schedule.alpha.device
    count = min(settings.pairs, settings.sampler_batch_size)
    sampler = TargetSampler(real_score, 1, settings.guidance_scale, settings.spacing)
    noise = torch.empty(count, *family.latent_shape(), device=device)
    sampler(noise, family.encode_prompts([""] * count))
    targets = torch.empty(settings.pairs, *family.latent_shape(), device=device)
    return WarmupPairs(_encode(family, [""] * settings.pairs, settings.sampler_batch_size), targets, 0)


def _encode(family: Family, prompts: list[str], batch_size: int) -> Conditioning:
    """Conditioning of all prompts, without the unconditional twin, which the student never sees."""
    parts = [family.encode_prompts(prompts[i : i + batch_size]) for i in range(0, len(prompts), batch_size)]
    kept = {
        entry.name: torch.cat([getattr(part, entry.name) for part in parts])
        for entry in fields(Conditioning)
        if isinstance(getattr(parts[0], entry.name), Tensor) and not entry.name.startswith("negative_")
    }
    return Conditioning(**kept)


def _rows(conditioning: Conditioning, chosen: Tensor) -> Conditioning:
    values = {entry.name: getattr(conditioning, entry.name) for entry in fields(Conditioning)}
    picked = {name: value[chosen] for name, value in values.items() if isinstance(value, Tensor)}
    return replace(conditioning, **picked)


def _gather(share: Tensor, world_size: int) -> Tensor:
    """The ranks' shares one after another, on every rank."""
    if world_size == 1:
        return share
    everything = share.new_empty((world_size * len(share), *share.shape[1:]))
    dist.all_gather_into_tensor(everything, share.contiguous())
    return everything
