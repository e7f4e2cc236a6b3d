"""Simulated ranks and workers, and how well the default window shuffles."""

import pickle
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from data.shards.dataset import ShardDataset
from data.shards.index import ShardSet
from data.shards.loader import Pass, RankPositions, ShardLoader
from data.shards.order.sample_order import SampleOrder
from data.shards.writer import ShardWriter, encode_latents

SIZES = [5, 1, 9, 2, 7, 11, 3, 8, 4, 6, 13]  # a prime number of shards, none like another


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    folder = tmp_path_factory.mktemp("unequal")
    for shard, size in enumerate(SIZES):
        with ShardWriter(folder, prefix=f"{shard:02d}-") as writer:
            for number in range(size):
                latents = torch.full((4, 1, 1), float(sum(SIZES[:shard]) + number))
                writer.write({"latent.safetensors": encode_latents(latents), "txt": "a"}, f"{shard}-{number}")
    return ShardSet.open(folder)


def read(shards: ShardSet, batch: int, world_size: int, workers: int, count: int) -> list[list[float]]:
    """`count` global batches as ranks with workers read them: each worker a dataset of its own, every W-th batch."""
    order = SampleOrder(shards.sizes, seed=9, shuffle_window_shards=3)
    template = ShardDataset(shards, order)
    found: list[list[float]] = [[] for _ in range(count)]
    for rank in range(world_size):
        positions = RankPositions(batch // world_size, rank, world_size)
        positions.current = Pass(0, count)
        copies = [pickle.loads(pickle.dumps(template)) for _ in range(max(1, workers))]
        for g, wanted in enumerate(positions):
            latents = copies[g % len(copies)].batch(wanted).latents
            found[g] += latents[:, 0, 0, 0].tolist()
        lengths = len(positions)
        assert lengths == count  # every rank makes the same number of steps
    return found


@pytest.mark.parametrize("world_size", range(1, 17))
def test_ranks_and_workers_change_nothing(shards: ShardSet, world_size: int) -> None:
    """Fewer shards (11) than ranks too; an epoch (69 samples) is no multiple of the batch."""
    total, batch = sum(SIZES), world_size * max(1, 16 // world_size)
    count = 2 * total // batch
    expected = read(shards, batch, 1, 0, count)
    seen = [value for found in expected for value in found]
    assert sorted(seen[:total]) == list(range(total))
    for workers in (0, 1, 2, 3, 4) if world_size in (1, 3, 16) else (world_size % 5,):
        assert read(shards, batch, world_size, workers, count) == expected, workers


def test_real_workers_agree_with_simulated_ones(shards: ShardSet) -> None:
    expected = read(shards, 12, 1, 0, 5)
    for workers in (1, 4):
        order = SampleOrder(shards.sizes, seed=9, shuffle_window_shards=3)
        loader = ShardLoader(ShardDataset(shards, order), 4, rank=1, world_size=3, num_workers=workers)
        found = [batch.latents[:, 0, 0, 0].tolist() for batch in loader if batch.latents is not None]
        loader.close()
        assert found == [batch[4:8] for batch in expected]


def correlation(shards: int, per_shard: int, seed: int, epoch: int = 0) -> float:
    """Of a sample's place in the written order with that in an epoch, for a data set written sorted."""
    order = SampleOrder([per_shard] * shards, seed)
    total = len(order)
    samples = order.samples_at(np.arange(epoch * total, (epoch + 1) * total))
    return float(np.corrcoef(samples, np.arange(total))[0, 1])


@pytest.mark.parametrize("shards", [64, 65, 100, 128, 129, 200, 1000])
def test_the_default_window_shuffles_what_was_written_sorted(shards: int) -> None:
    worst = max(abs(correlation(shards, 100_000 // shards, seed)) for seed in range(5))
    assert worst <= 0.02


def test_windows_are_dealt_fairly() -> None:
    """Each window holds one shard of every run of consecutive ones, all windows together every shard once."""
    for shards, window in ((7, 3), (65, 64), (130, 64), (12, 4), (1000, 64)):
        order = SampleOrder([1] * shards, seed=1, shuffle_window_shards=window)
        count = -(-shards // window)
        starts = order._epoch(0).window_starts
        sizes = np.diff(starts)
        assert len(sizes) == count and sizes.max() <= window and sizes.max() - sizes.min() <= 1
        emitted = order.samples_at(range(shards))
        for start, end in pairwise(starts.tolist()):
            lengths = np.full(-(-shards // count), count)
            lengths[len(lengths) // 2] = shards - count * (len(lengths) - 1)
            runs = np.searchsorted(np.cumsum(lengths), emitted[start:end], side="right")
            assert len(set(runs.tolist())) == end - start


def test_each_epoch_has_an_order_of_its_own() -> None:
    order = SampleOrder([50] * 100, seed=0)
    epochs = [order.samples_at(np.arange(5000) + 5000 * epoch) for epoch in range(4)]
    for a in range(4):
        for b in range(a):
            assert (epochs[a] == epochs[b]).mean() < 0.005


def test_each_shard_comes_to_nearly_all_ranks() -> None:
    """A loader that splits shards among ranks shows a rank the same ones for ever."""
    shards, per_shard, ranks, batch = 100, 20, 8, 64
    order = SampleOrder([per_shard] * shards, seed=0)
    total = len(order)
    positions = np.arange(20 * total)
    rank_of = positions % batch // (batch // ranks)
    shard_of = order.samples_at(positions) // per_shard
    met = np.zeros((shards, ranks), dtype=bool)
    met[shard_of, rank_of] = True
    assert met.mean(axis=1).min() >= 0.9
    in_one_epoch = np.zeros((shards, ranks), dtype=bool)
    in_one_epoch[shard_of[:total], rank_of[:total]] = True
    assert in_one_epoch.mean() > 0.8


def test_the_index_folder_may_be_elsewhere(shards: ShardSet, tmp_path: Path) -> None:
    folder = shards.shards[0].path.parent
    assert ShardSet.open(folder, tmp_path).fingerprint == shards.fingerprint
    assert len(list(tmp_path.glob("*.index.npz"))) == len(SIZES)
