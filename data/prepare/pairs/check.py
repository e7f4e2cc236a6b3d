"""Reads a set of pairs as trainings do, and verifies it by sampling some of it again."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Sequence
from typing import Any

import torch

from data.prepare.common.set_folder import RemoteFolder, SetFolder
from data.prepare.common.shard_files import tar_name
from data.prepare.pairs.pair_set import PairSet
from data.prepare.pairs.sampler import PairSampler
from data.shards.dataset import ShardDataset
from data.shards.index import ShardSet
from data.shards.layout import Content
from data.shards.order.sample_order import SampleOrder
from data.shards.store import ShardStore
from data.shards.tar_headers import BrokenShardError
from sdxs_lightning.core.errors import UserError
from sdxs_lightning.families import Family

_PAIRS_IN_STATISTICS = 1024
_TOLERANCE = {"float32": 2e-3, "float16": 3e-2, "bfloat16": 1e-1}
"""Largest difference, in standard deviations of the latents. On the machine that made a set the difference is 0; another
one rounds differently, and an ODE of many steps amplifies that."""


def open_pairs(folder: SetFolder, pair_set: PairSet, shards: Sequence[int]) -> ShardDataset:
    """The pairs of some shards, in order.

    Raises:
        UserError: for a shard that is broken or has the wrong number of pairs.
    """
    locations = [folder.location(tar_name(shard)) for shard in shards]
    patience = folder.patience if isinstance(folder, RemoteFolder) else None
    store = ShardStore(patience=patience)
    try:
        with tempfile.TemporaryDirectory() as indexes:
            found = ShardSet.open(locations, None if patience is None else indexes, store)
        order = SampleOrder(found.sizes, shuffle_window_shards=0)
        contents: tuple[Content, ...] = ("latents", "noise_seeds", "sizes")
        dataset = ShardDataset(found, order, contents, empty_captions="keep", store=store)
    except (BrokenShardError, OSError, ValueError) as error:
        raise UserError(f"{error} Remove that shard and run the same command again.") from error
    for location, shard, size in zip(locations, shards, found.sizes, strict=True):
        if size != len(pair_set.indices(shard)):
            raise UserError(
                f"{location} holds {size} pairs instead of {len(pair_set.indices(shard))}; remove it and run the same "
                "command again."
            )
    return dataset


def shards_for_statistics(folder: SetFolder, pair_set: PairSet) -> list[int]:
    """Of a complete set: all shards on a disk, which checks them; at a URL no more than the statistics need."""
    if isinstance(folder, RemoteFolder):
        return list(range(min(pair_set.shards, -(-_PAIRS_IN_STATISTICS // pair_set.samples_per_shard))))
    return list(range(pair_set.shards))


def pair_statistics(dataset: ShardDataset, family: Family) -> dict[str, float]:
    """Mean and standard deviation of the scaled latents of the first pairs; about 0 and 1 for a sampler that works."""
    latents = dataset.batch(range(min(len(dataset), _PAIRS_IN_STATISTICS))).latents
    assert latents is not None
    scaled = family.scale_latents(latents)
    return {"latents_mean": scaled.mean().item(), "latents_std": scaled.std().item()}


def verify_pairs(folder: SetFolder, sampler: PairSampler, batch_size: int, count: int) -> dict[str, Any]:
    """Samples random pairs again and compares them with the stored ones.

    Args:
        folder: of the set.
        sampler: of the set.
        batch_size: with that of the set, the same machine gives the same bits.
        count: number of pairs.

    Returns:
        The indices, and the largest difference in standard deviations of the stored latents.

    Raises:
        UserError: for a pair whose latents, noise seed or prompt differ.
    """
    pair_set = sampler.pair_set
    names = folder.names()
    shards = [shard for shard in range(pair_set.shards) if tar_name(shard) in names]
    dataset = open_pairs(folder, pair_set, shards)
    present = [i for shard in shards for i in pair_set.indices(shard)]
    chosen = sorted(random.SystemRandom().sample(range(len(present)), min(count, len(present))))
    largest = 0.0
    for place in chosen:
        index = present[place]
        shard = pair_set.indices(index // pair_set.samples_per_shard)
        # In the batch that it was sampled in: which kernels run depends on the batch size.
        start = shard.start + (index - shard.start) // batch_size * batch_size
        batch = range(start, min(start + batch_size, shard.stop))
        prompts, seeds, latents = sampler(batch)
        stored, row = dataset.batch([place]), index - start
        assert stored.latents is not None and stored.pair_noise_seeds is not None
        if stored.captions[0] != prompts[row] or int(stored.pair_noise_seeds[0]) != int(seeds[row]):
            raise UserError(
                f"pair {index} of '{folder}' has the prompt '{stored.captions[0]}' and noise seed "
                f"{int(stored.pair_noise_seeds[0])}, and should have '{prompts[row]}' and {int(seeds[row])}; were "
                "shards renamed?"
            )
        expected = latents[row].half().float()
        difference = (stored.latents[0] - expected).abs().max() / expected.std()
        largest = max(largest, float(torch.nan_to_num(difference, nan=float("inf"))))
        if largest > _TOLERANCE[pair_set.dtype]:
            raise UserError(
                f"pair {index} of '{folder}' differs from what its settings give by {largest:.3g} standard deviations "
                f"(allowed: {_TOLERANCE[pair_set.dtype]:g}); make the set again, in another folder."
            )
    return {"verified": [present[place] for place in chosen], "largest_difference": largest}
