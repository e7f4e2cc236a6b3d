"""Reading speed against the webdataset package on the same tars, in one run, alternating, the fastest of each."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.shards.datamodule import ShardDataModule
from data.shards.dataset import Content, ShardDataset
from data.shards.loader import Pass, ShardLoader
from data.shards.order import SampleOrder
from data.shards.scan import scan_shard
from evaluation.benchmarks import throughput_memory, throughput_webdataset
from evaluation.benchmarks.throughput_tars import jpeg_tars, latent_tars, many_shards

_SIDE_PX, _IMAGE_BATCH, _LATENT_BATCH = 512, 16, 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `python -m evaluation.benchmarks.throughput data`."""
    parser.add_argument("--jpegs", type=int, default=2000, help="samples (default: %(default)s)")
    parser.add_argument("--latents", type=int, default=2000, help="samples (default: %(default)s)")
    parser.add_argument("--index_samples", type=int, default=1_000_000, help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=2, help="reading processes (default: %(default)s)")
    parser.add_argument(
        "--step_seconds", type=float, default=0.25, help="of a training step that takes no CPU time"
    )
    parser.add_argument("--memory_seconds", type=float, default=60, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=3, help="of every timing (default: %(default)s)")
    parser.add_argument("--plot", type=Path, help="PNG of memory against time")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Every number of one run."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        jpegs = jpeg_tars(Path(folder, "jpeg"), options.jpegs)
        latents = latent_tars(Path(folder, "latent"), options.latents)
        traces = dict[str, dict[str, list[float]]]()
        parts: dict[str, Callable[[], Any]] = {
            "shuffle": shuffle_quality,
            "index": lambda: index_speed(jpegs),
            "raw_jpeg": lambda: raw(jpegs, "images", options.repeats),
            "raw_sdxl_latents": lambda: raw(latents, "latents", options.repeats),
            "jpeg_to_512": lambda: decoded(jpegs, options),
            "overhead": lambda: overhead(latents, options),
            "first_batch": lambda: [
                first_batch(Path(folder), shards, options.index_samples // shards, options.workers)
                for shards in (100, 1000)
            ],
            "memory": lambda: memories(jpegs, latents, options, traces),
        }
        result = {}
        for name, measure in parts.items():
            result[name] = measure()
            print(name, result[name], file=sys.stderr, flush=True)
    if options.plot is not None:
        throughput_memory.plot(traces, options.plot)
    load = {"load_average": os.getloadavg()[0], "cores": os.cpu_count()}
    return result | load | {"memory_traces": traces}


def _dataset(folder: Path, contents: list[Content], **options: Any) -> ShardDataset:
    data = ShardDataModule(str(folder), 1, contents=contents, **options)
    data.setup()
    assert data.dataset is not None
    return data.dataset


def _rate(read: Callable[[], int]) -> float:
    """Samples a second of this process's CPU time, which other programs do not take away."""
    start = time.process_time()
    return read() / (time.process_time() - start)


def index_speed(folder: Path) -> dict[str, float]:
    """Samples indexed a second, by headers alone."""
    path = next(folder.glob("*.tar"))
    return {"samples_per_second_and_core": max(_rate(lambda: len(scan_shard(path))) for _ in range(5))}


def raw(folder: Path, content: Content, repeats: int) -> dict[str, float]:
    """Undecoded samples: ours in a shuffled order, webdataset's in the written one."""
    dataset = _dataset(folder, [content, "sizes"])
    total = len(dataset)
    bytes_read = 0

    def ours() -> int:
        nonlocal bytes_read
        for start in range(0, total, 16):
            parts = dataset.raw(range(start, min(start + 16, total)))
            bytes_read += sum(map(len, parts[0]))
        return total

    def theirs() -> int:
        return sum(1 for _ in throughput_webdataset.raw_samples(folder))

    ours()
    rates = [(_rate(ours), _rate(theirs)) for _ in range(repeats)]
    return _compared(max(rate for rate, _ in rates), max(rate for _, rate in rates))


def decoded(folder: Path, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Pictures as 512 px tensors at equal numbers of reading processes: by CPU time without, by wall clock with any."""
    found = {}
    for workers in (0, options.workers):
        dataset = _dataset(folder, ["images"], resolution=_SIDE_PX)
        loader = ShardLoader(dataset, _IMAGE_BATCH, num_workers=workers)
        seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
        for _ in range(options.repeats):
            clock = time.perf_counter if workers else time.process_time
            seconds["ours"].append(_seconds(iter(loader), clock))
            loader.close()
            theirs = throughput_webdataset.image_batches(folder, _SIDE_PX, _IMAGE_BATCH, workers)
            seconds["theirs"].append(_seconds(theirs, clock))
        found[f"{workers} workers"] = _compared(*(_IMAGE_BATCH / min(times) for times in seconds.values()))
    return found


def _seconds(batches: Iterator[Any], clock: Callable[[], float], count: int = 8) -> float:
    """A batch's, after the first two: starting the processes is no part of it."""
    for _ in islice(batches, 2):
        pass
    start = clock()
    read = sum(1 for _ in islice(batches, count))
    return (clock() - start) / read


def _compared(ours: float, theirs: float) -> dict[str, float]:
    return {"samples_per_second": ours, "webdataset_samples_per_second": theirs, "ratio": ours / theirs}


def overhead(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """What a training waits for its latents, as a share of steps that themselves leave the CPU alone, as on a GPU."""
    loader = ShardLoader(_dataset(folder, ["latents", "sizes"]), _LATENT_BATCH, num_workers=options.workers)
    waited, steps = 0.0, 0
    for _ in range(2):
        batches = iter(loader)
        next(batches)
        while True:
            start = time.perf_counter()
            if next(batches, None) is None:
                break
            waited, steps = waited + time.perf_counter() - start, steps + 1
            time.sleep(options.step_seconds)
    loader.close()
    share = waited / steps / options.step_seconds
    return {
        "waited_ms_per_step": 1000 * waited / steps,
        "step_seconds": options.step_seconds,
        "batch_size": _LATENT_BATCH,
        "share": share,
    }


def memories(
    jpegs: Path, latents: Path, options: argparse.Namespace, traces: dict[str, dict[str, list[float]]]
) -> dict[str, float]:
    """How much more memory the second half of the time needed than the first; fills `traces`."""
    traces["512 px images"] = memory(jpegs, "images", options)
    traces["SDXL latents"] = memory(latents, "latents", options)
    return {name: throughput_memory.growth(trace["megabytes"]) for name, trace in traces.items()}


def memory(folder: Path, content: Content, options: argparse.Namespace) -> dict[str, list[float]]:
    """Of this process and its reading processes, epoch after epoch."""
    dataset = _dataset(folder, [content], resolution=_SIDE_PX if content == "images" else None)
    loader = ShardLoader(dataset, _IMAGE_BATCH, num_workers=options.workers)
    batches = (batch for _ in range(10**6) for batch in loader)
    try:
        return throughput_memory.trace(batches, options.memory_seconds, every=10)
    finally:
        batches.close()
        loader.close()


def first_batch(root: Path, shards: int, samples: int, workers: int) -> dict[str, float]:
    """From the constructor to the first batch of a run that is resumed in the middle of its second epoch."""
    folder = many_shards(root / f"many-{shards}", shards, samples)
    start = time.perf_counter()
    ShardDataModule(str(folder), 16).prepare_data()
    indexed = time.perf_counter() - start
    start, start_cpu = time.perf_counter(), time.process_time()
    dataset = _dataset(folder, ["latents"])
    middle = 3 * len(dataset) // 2 // 16
    loader = ShardLoader(dataset, 16, num_workers=workers, next_pass=lambda count: Pass(middle, 10))
    batch = next(iter(loader))
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
    loader.close()
    assert int(batch.positions[0]) == middle * 16
    return {
        "shards": shards,
        "samples": shards * samples,
        "index_seconds": indexed,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
    }


def shuffle_quality() -> dict[str, Any]:
    """Correlation of written and emitted place at the default window; ranks that a shard comes to in 20 epochs."""
    found: dict[str, float] = {}
    for shards in (16, 64, 100, 200, 1000, 5000):
        order = SampleOrder([200_000 // shards] * shards)
        samples = order.samples_at(np.arange(len(order)))
        found[str(shards)] = float(abs(np.corrcoef(samples, np.arange(len(order)))[0, 1]))
    order = SampleOrder([20] * 200)
    positions = np.arange(20 * len(order))
    met = np.zeros((200, 8), dtype=bool)
    met[order.samples_at(positions) // 20, positions % 64 // 8] = True
    return {
        "shuffle_correlation_by_shards": found,
        "least_share_of_8_ranks_that_a_shard_visits_in_20_epochs": float(met.mean(axis=1).min()),
    }
