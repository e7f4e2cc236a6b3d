"""Two processes measure what one process measures."""

from __future__ import annotations

import datetime
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from evaluation.clip_score import ClipScore
from evaluation.features import FrozenClip
from evaluation.frechet import FeatureStatistics, FrechetDistance
from evaluation.generate import rank_batches
from tests.evaluation.judges import random_images

COUNT = 11


def scores(folder: Path, rank: int, world_size: int, batch_size: int) -> tuple[float, float, int]:
    """FID and CLIP score over this rank's share of `COUNT` images; images seen by this rank alone."""
    clip = FrozenClip(folder)
    images, captions = random_images(COUNT), [f"a {'red' if i % 2 else 'blue'} circle" for i in range(COUNT)]
    reference = FeatureStatistics.from_features(clip.image_features(random_images(40, seed=1)))
    fid, score = FrechetDistance(clip.image_features, clip.dimensions, reference), ClipScore(clip)
    for sample_ids, counting in rank_batches(COUNT, batch_size, rank, world_size):
        sample_ids = sample_ids[:counting]
        fid.update(images[sample_ids])
        score.update(images[sample_ids], [captions[i] for i in sample_ids.tolist()])
    outcome = float(fid.compute()), float(score.compute())
    return *outcome, int(score.count)


def worker(rank: int, folder: Path, out: Path) -> None:
    """One of two ranks; writes what it computed."""
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=120)
    dist.init_process_group(
        "gloo", init_method=f"file://{out}/store", rank=rank, world_size=2, timeout=timeout
    )
    torch.save(scores(folder, rank, 2, batch_size=3), out / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_equal_one(clip_folder: Path, tmp_path: Path) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    spawn(worker, args=(clip_folder, tmp_path), nprocs=2)
    fid, score, _ = scores(clip_folder, 0, 1, batch_size=COUNT)
    seen = 0
    for rank in (0, 1):
        rank_fid, rank_score, rank_count = torch.load(tmp_path / f"{rank}.pt")
        # Features differ by float32 rounding between batch sizes; the sums themselves are float64.
        assert rank_fid == pytest.approx(fid, rel=1e-5)
        assert rank_score == pytest.approx(score, rel=1e-6)
        seen += rank_count
    assert seen == COUNT  # after compute the states are the rank's own again


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_every_sample_once_and_as_many_batches_on_every_rank(world_size: int, batch_size: int) -> None:
    shares = [list(rank_batches(5, batch_size, rank, world_size)) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    assert all(len(sample_ids) >= 1 for share in shares for sample_ids, _ in share)
    counted = [
        i for share in shares for sample_ids, counting in share for i in sample_ids[:counting].tolist()
    ]
    assert sorted(counted) == [0, 1, 2, 3, 4]
