"""Making many small shards: the cost of claims and of Ray against a plain loop over the same shards, one process each."""

from __future__ import annotations

import io
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from data.prepare.common.shared_work import LocalProcesses, SetProgress, workforce
from data.prepare.images.command import SETTINGS_FILE, ImageJob, ImageSet
from data.prepare.images.options import ImageOptions
from data.prepare.images.sources import open_source
from data.shards.writer import ShardWriter
from sdxs_lightning.core.errors import UserError

if TYPE_CHECKING:
    from evaluation.benchmarks.throughput import ShardsOptions


def run(options: ShardsOptions) -> dict[str, Any]:
    """Seconds of each way, the fastest of the repeats, and what it takes longer than the plain loop.

    Raises:
        UserError: without Ray.
    """
    try:
        from ray.cluster_utils import Cluster
    except ImportError:
        raise UserError("this benchmark needs the extra ray: `uv sync --extra ray`.") from None
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        with tempfile.TemporaryDirectory() as work:
            folder = Path(work)
            _write_source(folder / "source", options.shards * options.images)
            ways: dict[str, Callable[[ImageJob, Sequence[int]], float]] = {
                "plain_loop": _plain,
                "claims": _claims,
                "ray": lambda job, shards: _ray(job, shards, cluster.address),
            }
            seconds: dict[str, list[float]] = {name: [] for name in ways}
            for repeat in range(options.repeats):
                for name, way in ways.items():
                    job = _job(folder / "source", folder / f"{name}-{repeat}", options)
                    seconds[name].append(way(job, range(options.shards)))
            sums = {name: _checksums(folder / f"{name}-0") for name in ways}
    finally:
        cluster.shutdown()
    fastest = {name: min(times) for name, times in seconds.items()}
    plain = fastest["plain_loop"]
    return {
        "shards": options.shards,
        "images_per_shard": options.images,
        "seconds": seconds,
        "overhead": {
            name: round(one / plain - 1, 3) for name, one in fastest.items() if name != "plain_loop"
        },
        "same_bytes": sums["claims"] == sums["plain_loop"] == sums["ray"],
    }


def _write_source(folder: Path, count: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG")
    with ShardWriter(folder, samples_per_shard=1000) as writer:
        for number in range(count):
            writer.write({"jpg": stream.getvalue(), "txt": f"image {number}"})


def _job(source: Path, out: Path, options: ShardsOptions) -> ImageJob:
    chosen = ImageOptions(
        source=str(source), out=str(out), resolution=48, samples_per_shard=options.images, processes=1
    )
    opened = open_source(str(source), remote=chosen)
    image_set = ImageSet(chosen, opened.fingerprint, len(opened))
    chosen.output.create(SETTINGS_FILE, b"{}")
    return ImageJob(image_set, chosen.output, "cpu")


def _plain(job: ImageJob, shards: Sequence[int]) -> float:
    start = time.monotonic()
    job.work(0, ((shard, None) for shard in shards), lambda _: None)  # type: ignore[misc]  # unclaimed
    return time.monotonic() - start


def _claims(job: ImageJob, shards: Sequence[int]) -> float:
    start = time.monotonic()
    LocalProcesses("cpu", 1).make(job, shards, _progress(job, shards))
    return time.monotonic() - start


def _ray(job: ImageJob, shards: Sequence[int], address: str) -> float:
    """Without connecting to the cluster, and without the first shard, whose process imports torch."""
    options = replace(job.image_set.options, ray=address, processes=None)
    with workforce(options, network=False) as workers:
        workers.make(job, shards[:1], _progress(job, shards[:1]))
        start = time.monotonic()
        workers.make(job, shards[1:], _progress(job, shards[1:]))
        return (time.monotonic() - start) * len(shards) / (len(shards) - 1)


def _progress(job: ImageJob, shards: Sequence[int]) -> SetProgress:
    return SetProgress({shard: len(job.image_set.indices(shard)) for shard in shards}, "images")


def _checksums(folder: Path) -> dict[str, str]:
    from data.prepare.common.checksums import recorded_sums

    return recorded_sums(folder)
