"""The noise of a target sampler's pair, regenerated from one stored integer."""

from __future__ import annotations

from torch import Tensor

from sdxs_lightning.core.seeding import Stream, normal

SEEDS = range(1 << 31)
"""Valid seeds of a set of pairs."""
_INDEX_BITS = 32


def noise_seeds(seed: int, indices: Tensor) -> Tensor:
    """Returns the integers to store with pairs: seed and index in one, so that sets with different seeds can be mixed.

    Args:
        seed: seed of the set of pairs, in [0, 2^31).
        indices: (B,), int64, in [0, 2^32): indices in the set.

    Returns:
        (B,), int64, seed * 2^32 + index.

    Raises:
        ValueError: if the seed is out of range.
    """
    if seed not in SEEDS:
        raise ValueError(f"the seed of a set of pairs must be in [0, {SEEDS[-1]}], got {seed}.")
    return indices + (seed << _INDEX_BITS)


def pair_noise(seeds: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Regenerates noise from stored integers, bit-identical on every device and for every batch size.

    Args:
        seeds: (B,), int64, from `noise_seeds`; `pair_noise_seeds` of a TrainingBatch.
        shape: shape of one sample's noise, (C, h, w).

    Returns:
        (B, *shape), float32, N(0, 1), on the device of seeds.
    """
    return normal(0, Stream.PAIRS, seeds, shape)
