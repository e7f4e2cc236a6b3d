"""One of the ranks of test_image_metrics.py: measures its share of a set."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from evaluation.callbacks.image_metrics import ImageMetrics
from evaluation.protocols.image_protocol import ImageProtocol, Measurement
from evaluation.protocols.protocols import IMAGE_PROTOCOLS
from evaluation.protocols.references import write_reference
from tests.helpers.metric_networks import random_images

COUNT = 31
SMALL = ImageProtocol(
    "small",
    (
        Measurement("fid", "clip_image:vit-b-32", ("resize 24 lanczos",)),
        Measurement("cmmd", "clip_image:vit-b-32", ("resize 24 lanczos",)),
        Measurement("clip_score", "clip_text:vit-b-32"),
    ),
    samples=COUNT,
)


def made(captions: Sequence[str], sample_ids: Tensor) -> Tensor:
    """A maker of images: functions of their numbers."""
    return random_images(COUNT)[sample_ids]


def callback(world: Path, folder: Path, **settings: Any) -> ImageMetrics:
    """ImageMetrics with the tiny CLIP, against 40 random images; writes the files that it reads."""
    IMAGE_PROTOCOLS["small"] = SMALL
    (folder / "captions.txt").write_text(
        "\n".join(f"a {'red' if i % 2 else 'blue'} circle" for i in range(COUNT))
    )
    clip = str(world / "clip")
    metrics = ImageMetrics(
        str(folder / "captions.txt"),
        str(folder / "real.npz"),
        protocol="small",
        weights={"clip_image": clip, "clip_text": clip},
        **settings,
    )
    for one in metrics.measurements[:2]:
        network = metrics._networks.network(one.network)
        rows = network(random_images(40, seed=1))
        write_reference(folder / "real.npz", one, metrics._networks.identity(one), rows, "digest")
    return metrics


def measure_share(world: Path, folder: Path) -> None:
    """What a rank sees; a file each."""
    rank, ranks = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    own = folder / f"own_{rank}"
    own.mkdir()
    metrics = callback(world, own, batch_size=4)
    metrics.setup(None, None, "fit")  # type: ignore[arg-type]
    found = metrics.estimates(made, torch.device("cpu"), rank, ranks)
    (folder / f"rank{rank}.json").write_text(json.dumps({k: v.as_dict() for k, v in found.items()}))
    dist.destroy_process_group()
