"""The noise of stored pairs."""

from __future__ import annotations

import pytest
import torch

from sdxs_lightning.core.pair_noise import noise_seeds, pair_noise
from sdxs_lightning.core.seeding import Stream, normal


def test_noise_depends_on_seed_and_index_alone() -> None:
    indices = torch.tensor([0, 7, 2**31])
    seeds = noise_seeds(5, indices)
    assert seeds.tolist() == [5 * 2**32, 5 * 2**32 + 7, 5 * 2**32 + 2**31]
    noise = pair_noise(seeds, (4, 8, 8))
    assert torch.equal(noise[1:2], pair_noise(seeds[1:2], (4, 8, 8)))
    assert abs(float(noise.mean())) < 0.15 and float(noise.std()) == pytest.approx(1, abs=0.1)
    assert torch.equal(pair_noise(noise_seeds(0, indices), (2,)), normal(0, Stream.PAIRS, indices, (2,)))


def test_sets_of_two_seeds_share_no_noise() -> None:
    indices = torch.arange(50)
    both = pair_noise(torch.cat([noise_seeds(seed, indices) for seed in (0, 1)]), (4,))
    assert len(torch.unique(both, dim=0)) == 100
    assert torch.corrcoef(both.flatten().view(2, -1))[0, 1].abs() < 0.2


@pytest.mark.parametrize("seed", [-1, 2**31])
def test_other_seeds_are_refused(seed: int) -> None:
    with pytest.raises(ValueError, match=rf"must be in \[0, 2147483647\], got {seed}"):
        noise_seeds(seed, torch.arange(2))
