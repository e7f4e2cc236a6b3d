"""What each rank of test_metric_ranks.py does: its share of the images, some of them twice, some ranks with none."""

from __future__ import annotations

import json
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from evaluation.metrics.frechet import FrechetDistance
from evaluation.metrics.kernel_distance import KernelDistance, MaximumMeanDiscrepancy
from evaluation.metrics.precision_recall import PrecisionRecall
from evaluation.metrics.sampled import PerImageMetric, SampledMetric

COUNT = 90
DIMENSIONS = 10


class FirstColumn(PerImageMetric):
    names = ("first",)


def rows(seed: int) -> Tensor:
    return torch.randn(COUNT, DIMENSIONS, generator=torch.Generator().manual_seed(seed)) + 0.2 * seed


def same(features: Tensor) -> Tensor:
    return features


def measured(rank: int, ranks: int, batch_size: int, group: Any = None, many: int = COUNT) -> dict[str, Any]:
    """All numbers over this rank's share. The last rank has no image; the others' shares overlap."""
    metrics: dict[str, SampledMetric] = {
        "fid": FrechetDistance(same, DIMENSIONS),
        "kid": KernelDistance(same, subsets=3, subset_size=20),
        "cmmd": MaximumMeanDiscrepancy(same),
        "precision": PrecisionRecall(same),
    }
    score = FirstColumn()
    working = max(ranks - 1, 1)
    for seed, real in ((1, False), (0, True)):
        ids = torch.arange(many)[rank::working] if rank < working else torch.arange(0)
        if rank == 0 and ranks > 1:
            ids = torch.cat([ids, torch.tensor([1, 2, 5])])  # also on other ranks
        for batch in ids.split(batch_size):
            for metric in metrics.values():
                metric.add(rows(seed)[batch], batch, real)
            if not real:
                score.add(rows(seed)[batch, :1].double(), batch)
    found: dict[str, Any] = {}
    for metric in (*metrics.values(), score):
        metric.process_group = group
        found |= {name: estimate.as_dict() for name, estimate in metric.estimates().items()}
    for name, metric in metrics.items():
        value = metric.compute()
        found[f"{name}-computed"] = {"value": float(value["precision"] if isinstance(value, dict) else value)}
    fid = metrics["fid"]
    assert isinstance(fid, FrechetDistance)
    kept = fid.rows_of("fake")[0]
    assert len(kept) == int(fid.fake_count)
    return found | {"rows-after": len(kept)}


def measure_in_ranks(out: Path) -> None:
    """As four ranks, as two of them, and with fewer images than dimensions."""
    rank = int(os.environ["LOCAL_RANK"])
    dist.init_process_group("gloo", rank=rank, timeout=timedelta(seconds=120))
    pair = dist.new_group([0, 1])
    found = {"four": measured(rank, 4, batch_size=7), "few": measured(rank, 4, batch_size=3, many=30)}
    if rank < 2:
        found["two"] = measured(rank, 2, batch_size=COUNT, group=pair)
    (out / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
