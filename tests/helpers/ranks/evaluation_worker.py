"""One of two processes: of test_distributed_metrics.py, which distil under DDP and FSDP2 and measure on the way, or of commands
that share an evaluation.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from PIL import Image

from evaluation.callbacks.run_report import Report
from evaluation.callbacks.sample_grids import DistillationMetrics, SampleGrids
from evaluation.evaluate import main as evaluate
from evaluation.images.generate import rank_batches
from evaluation.images.samples import ModelSamples, Reader
from evaluation.metrics.clip_score import ClipScore
from evaluation.metrics.frechet import FeatureStatistics, FrechetDistance
from evaluation.networks.frozen_clip import FrozenClip
from evaluation.protocols.protocols import PROTOCOLS
from sdxs_lightning.stages.distillation.update_schedule import UpdateSchedule
from tests.helpers.metric_networks import random_images, small_protocols
from tests.helpers.ranks.distributed_worker import STRATEGIES, strategy_of
from tests.helpers.tiny_distillation import distillation, fit

UPDATES = 2
GLOBAL_BATCH = 4
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


def measured(world: Path, out: Path, **settings: Any) -> dict[str, Any]:
    """Distil with all measuring callbacks; the curve, and the report where this rank writes one."""
    PROTOCOLS.update(small_protocols(world))
    metrics = DistillationMetrics(1, batch_size=2)
    report = Report(
        str(out), teacher_steps=[2, 1], teacher_results=str(out / "none.json"), columns=2, batch_size=2
    )
    callbacks: list[Callback] = [metrics, SampleGrids(1, images=2, folder=str(out / "samples")), report]
    update_schedule = UpdateSchedule(max_student_updates=UPDATES, fake_score_updates_per_student_update=1)
    module = distillation(world / "sd-epsilon", update_schedule=update_schedule)
    processes = settings.get("devices", 1)
    settings |= {"callbacks": callbacks, "default_root_dir": out}
    fit(module, world / "shards", UPDATES, GLOBAL_BATCH // processes, **settings)
    written = out / "report.json"
    return {
        "fid": [point["fid"] for point in metrics.history],
        "caption_accuracy": [point["caption_accuracy"] for point in metrics.history],
        "report": json.loads(written.read_text()) if written.exists() else None,
    }


def measure_everything(world: Path, out: Path) -> None:
    """Both strategies, then the metrics alone; each rank writes what it saw."""
    rank = int(os.environ["LOCAL_RANK"])
    for name in STRATEGIES:
        result = measured(world, out / name, devices=2, strategy=strategy_of(name))
        (out / f"{name}-{rank}.json").write_text(json.dumps(result))
    # Lightning has left the process group open.
    (out / f"scores-{rank}.json").write_text(json.dumps(scores(world / "clip", rank, 2, batch_size=3)))


def shared_evaluation(arguments: list[str], folder: Path, count: int) -> int:
    """`evaluate` as one of `count` commands that measure at the same moment; notes the numbers of the images that it made."""
    rank = int(os.environ["LOCAL_RANK"])
    opened = ModelSamples.open

    def counted(self: ModelSamples, device: torch.device) -> Reader:
        read = opened(self, device)
        (folder / f"ready-{rank}").touch()
        while len(list(folder.glob("ready-*"))) < count:
            time.sleep(0.02)

        def note(numbers: Sequence[int]) -> list[Image.Image]:
            with (folder / f"made-{rank}.txt").open("a") as file:
                file.writelines(f"{number}\n" for number in numbers)
            time.sleep(0.1)  # so that none of them is done before another has begun
            return read(numbers)

        return note

    ModelSamples.open = counted  # type: ignore[method-assign]
    evaluate([*arguments, "--out", str(folder / f"{rank}.json")])
    return 0
