"""The noise of a target sampler's pair, derived from one integer, which is stored instead of the noise."""

from __future__ import annotations

from torch import Tensor

from sdxs_lightning.core.seeding import Stream, normal

SEEDS = range(1 << 31)
"""The seeds that a set of pairs can have."""
_INDEX_BITS = 32


def noise_seeds(seed: int, indices: Tensor) -> Tensor:
    """The integers that are stored with pairs: seed and index in one, so that sets of several seeds can be mixed.

    Args:
        seed: of the set of pairs, in [0, 2^31).
        indices: (B,), int64, in [0, 2^32): which pairs of the set.

    Returns:
        (B,), int64, seed * 2^32 + index.

    Raises:
        ValueError: for a seed outside its range.
    """
    if seed not in SEEDS:
        raise ValueError(f"the seed of a set of pairs must be in [0, {SEEDS[-1]}], got {seed}.")
    return indices + (seed << _INDEX_BITS)


def pair_noise(seeds: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The noise of stored integers: the same bits on every device and for every batch size.

    Args:
        seeds: (B,), int64, as `noise_seeds` made them; `pair_noise_seeds` of a TrainingBatch.
        shape: of one sample's noise, (C, h, w).

    Returns:
        (B, *shape), float32, N(0, 1), on the device of seeds.
    """
    return normal(0, Stream.PAIRS, seeds, shape)
