"""Pairs that are sampled once at the start of the fit and kept on the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from sdxs_lightning.core.batch import Conditioning
from sdxs_lightning.core.seeding import Stream, integers, normal
from sdxs_lightning.families import Family
from sdxs_lightning.pairs.scheduler_sampler import SchedulerSampler
from sdxs_lightning.pairs.target_sampler import TargetSampler

Extract = Callable[[Tensor], Tensor]
"""Maps images (B, 3, H, W) in [-1, 1] to their condition images (B, C, H, W), uint8."""
Guide = Callable[[Conditioning, Tensor], Conditioning]
"""Gives B prompts the guidance scales and negative prompts that positions (B,), int64, determine."""


class PickedPairs(NamedTuple):
    """One pair per sample of a micro-batch."""

    noise: Tensor
    """(B, C, h, w), float32, N(0, 1): the student's input."""
    conditioning: Conditioning
    """Conditioning of the pairs' prompts, with unconditional embeddings."""
    target: Tensor
    """(B, C, h, w), float32, scaled latents: the target sampler's output for the same noise and prompts."""


class StoredPairs:
    """Prompt embeddings and target latents of all pairs; the noise is regenerated from a pair's index.

    Embeddings stay on the device, so that picking a batch does not synchronise with the host: 2048 pairs take 0.5 GB for SD
    in float32.

    Args:
        conditioning: of n prompts, without unconditional embeddings.
        twin: the unconditional conditioning, one row for all prompts.
        targets: (n, C, h, w), scaled latents.
        seed: seed of the run.
        controls: (n, C, H, W), uint8, condition images of the targets' images; None without a ControlNet.
        guide: gave each target its guidance scale and negative prompt, by the pair's index; None if all have the same.
    """

    def __init__(
        self,
        conditioning: Conditioning,
        twin: Conditioning,
        targets: Tensor,
        seed: int,
        controls: Tensor | None = None,
        guide: Guide | None = None,
    ) -> None:
        self.conditioning = conditioning
        self.targets, self.controls = targets, controls
        self._twin = twin
        self._seed = seed
        self._guide = guide

    def __len__(self) -> int:
        return len(self.targets)

    def pick(self, positions: Tensor) -> PickedPairs:
        """Returns a pair for each position in the run."""
        # Drawn with replacement, as a function of the position alone, so there is no shuffle state to save. The stream of the
        # student's noise is free here, since the noise comes from the pair.
        chosen = integers(self._seed, Stream.STUDENT_NOISE, positions, 0, len(self))
        noise = normal(self._seed, Stream.PAIRS, chosen, tuple(self.targets.shape[1:]))
        conditioning = self._conditioning_of(chosen)
        if self._guide is not None:
            conditioning = self._guide(conditioning, chosen)
        return PickedPairs(noise, conditioning, self.targets[chosen])

    def _conditioning_of(self, chosen: Tensor) -> Conditioning:
        values = {entry.name: getattr(self.conditioning, entry.name) for entry in fields(Conditioning)}
        rows = {name: value[chosen] for name, value in values.items() if isinstance(value, Tensor)}
        twin = {
            f"negative_{name}": getattr(self._twin, name).expand_as(rows[name])
            for name in ("prompt_embeds", "pooled_prompt_embeds")
            if getattr(self._twin, name) is not None
        }
        if self.controls is not None:
            rows["control_images"] = self.controls[chosen].float() / 255
        return replace(self.conditioning, **rows, **twin)


@torch.no_grad()
def sample_pairs(
    count: int,
    batch_size: int,
    captions: Sequence[str],
    family: Family,
    sampler: TargetSampler | SchedulerSampler,
    seed: int,
    extract: Extract | None = None,
    guide: Guide | None = None,
) -> StoredPairs:
    """Samples the pairs; the work is divided among ranks, and every rank gets all pairs.

    Args:
        count: number of pairs.
        batch_size: pairs per sampling batch on each rank.
        captions: prompts; repeated if fewer than `count`.
        family: encodes the prompts.
        sampler: samples the targets.
        seed: seed of the run; with a pair's index it determines the pair's noise.
        extract: makes the condition images of the targets' images; None without a ControlNet.
        guide: gives each pair, by its index, a guidance scale and a negative prompt; None is the sampler's scale.

    Returns:
        The same pairs on every rank, and after a resume.

    Raises:
        ValueError: if there are no captions.
    """
    if not captions:
        raise ValueError("pairs in memory need captions and the training data has none.")
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    # Rounded up to full batches on every rank: a sharded network needs all ranks in every call.
    share = -(-count // world_size)
    batches, controls = [], []
    for first in range(rank * share, (rank + 1) * share, batch_size):
        past = min(first + batch_size, (rank + 1) * share)
        index = torch.arange(first, past, device=family.schedule.alpha.device)
        prompts = [captions[i % len(captions)] for i in range(first, past)]
        noise = normal(seed, Stream.PAIRS, index, family.latent_shape())
        conditioning = family.encode_prompts(prompts)
        batches.append(sampler(noise, conditioning if guide is None else guide(conditioning, index)))
        controls += [] if extract is None else [extract(family.decode(batches[-1]))]
        if len(batches) % 4 == 0:
            rank_zero_info(f"pairs: {world_size * (past - rank * share)} of {world_size * share}")
    targets = _gather(torch.cat(batches), world_size)[:count]
    prompts = [captions[i % len(captions)] for i in range(count)]
    made = _gather(torch.cat(controls), world_size)[:count] if controls else None
    return StoredPairs(*_encode(family, prompts, batch_size), targets, seed, made, guide)


@torch.no_grad()
def planned_pairs(
    count: int,
    batch_size: int,
    family: Family,
    sampler: TargetSampler | SchedulerSampler,
    with_controls: bool = False,
    guide: Guide | None = None,
) -> StoredPairs:
    """Replaces `sample_pairs` in the memory plan, with the same peak and the same stored tensors.

    Args:
        count: number of pairs.
        batch_size: pairs per sampling batch.
        family: a family without weights.
        sampler: a one-step sampler on the meta device.
        with_controls: whether condition images are stored too.
        guide: as `sample_pairs` gets it.
    """
    device = family.schedule.alpha.device
    at_once = min(count, batch_size)
    noise = torch.empty(at_once, *family.latent_shape(), device=device)
    conditioning = family.encode_prompts([""] * at_once)
    index = torch.arange(at_once, device=device)
    sampler(noise, conditioning if guide is None else guide(conditioning, index))
    targets = torch.empty(count, *family.latent_shape(), device=device)
    side = family.resolution
    controls = torch.empty(count, 3, side, side, dtype=torch.uint8, device=device) if with_controls else None
    return StoredPairs(*_encode(family, [""] * count, batch_size), targets, 0, controls, guide)


def _encode(family: Family, prompts: list[str], batch_size: int) -> tuple[Conditioning, Conditioning]:
    """Returns the conditioning of all prompts without unconditional embeddings, and one row of the latter for all."""
    parts = [family.encode_prompts(prompts[i : i + batch_size]) for i in range(0, len(prompts), batch_size)]
    kept = {
        entry.name: torch.cat([getattr(part, entry.name) for part in parts])
        for entry in fields(Conditioning)
        if isinstance(getattr(parts[0], entry.name), Tensor) and not entry.name.startswith("negative_")
    }
    # Cloned, since a view of one row would keep the batch alive.
    twin = parts[0][:1].unconditional()
    row = {
        entry.name: value.clone()
        for entry in fields(Conditioning)
        if isinstance(value := getattr(twin, entry.name), Tensor)
    }
    return Conditioning(**kept), Conditioning(**row)


def _gather(share: Tensor, world_size: int) -> Tensor:
    """All-gathers the ranks' shares along dim 0."""
    if world_size == 1:
        return share
    everything = share.new_empty((world_size * len(share), *share.shape[1:]))
    dist.all_gather_into_tensor(everything, share.contiguous())
    return everything
