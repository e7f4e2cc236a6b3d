"""Reading speed against the webdataset package on the same tars: alternating in one run, fastest repeat of each."""

from __future__ import annotations

import io
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import webdataset
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from data.shards.datamodule import ShardDataModule
from data.shards.dataset import Content, ShardDataset
from data.shards.loader import Pass, ShardLoader
from data.shards.order.sample_order import SampleOrder
from data.shards.scan import scan_shard
from data.shards.writer import ShardWriter, encode_latents

if TYPE_CHECKING:
    from evaluation.benchmarks.throughput import DataOptions

_SIDE_PX, _IMAGE_BATCH, _LATENT_BATCH = 512, 16, 32
_JPEG_SIDE_PX = 768
_DISTINCT = 48
"""Images and latents that are generated; samples repeat them under other keys."""


def run(options: DataOptions) -> dict[str, Any]:
    """Run all timings."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    photographs = [_photograph(rng) for _ in range(min(_DISTINCT, options.jpegs))]
    rng = np.random.default_rng(0)
    shape = (4, 128, 128)  # SDXL at 1024 px
    arrays = (rng.standard_normal(shape, dtype=np.float32) for _ in range(min(_DISTINCT, options.latents)))
    with tempfile.TemporaryDirectory() as folder:
        jpegs = write_tars(Path(folder, "jpeg"), options.jpegs, "jpg", photographs)
        latents = write_tars(
            Path(folder, "latent"),
            options.latents,
            "latent.safetensors",
            [encode_latents(each) for each in arrays],
        )
        traces = dict[str, dict[str, list[float]]]()

        def memories() -> dict[str, float]:
            traces["512 px images"] = memory(jpegs, "images", options)
            traces["SDXL latents"] = memory(latents, "latents", options)
            return {name: memory_growth(trace["megabytes"]) for name, trace in traces.items()}

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
            "memory": memories,
        }
        result = {}
        for name, measure in parts.items():
            result[name] = measure()
            print(name, result[name], file=sys.stderr, flush=True)
    if options.plot is not None:
        _plot_memory(traces, options.plot)
    load = {"load_average": os.getloadavg()[0], "cores": os.cpu_count()}
    return result | load | {"memory_traces": traces}


def _dataset(folder: Path, contents: list[Content], **options: Any) -> ShardDataset:
    data = ShardDataModule(str(folder), 1, contents=contents, **options)
    data.setup()
    assert data.dataset is not None
    return data.dataset


def _rate(read: Callable[[], int]) -> float:
    """Samples per second of CPU time of this process, which is independent of other load."""
    start = time.process_time()
    return read() / (time.process_time() - start)


def index_speed(folder: Path) -> dict[str, float]:
    """Samples indexed per second; only headers are read."""
    path = next(folder.glob("*.tar"))
    return {"samples_per_second_and_core": max(_rate(lambda: len(scan_shard(path))) for _ in range(5))}


def raw(folder: Path, content: Content, repeats: int) -> dict[str, float]:
    """Rate of undecoded samples: ours in shuffled order, webdataset's in the stored order."""
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
        return sum(1 for _ in webdataset.WebDataset(_urls(folder), shardshuffle=False))

    ours()
    rates = [(_rate(ours), _rate(theirs)) for _ in range(repeats)]
    return _compared(max(rate for rate, _ in rates), max(rate for _, rate in rates))


def decoded(folder: Path, options: DataOptions) -> dict[str, dict[str, float]]:
    """Images as 512 px tensors at equal numbers of workers: CPU time without workers, wall clock with them."""
    found = {}
    for workers in (0, options.workers):
        dataset = _dataset(folder, ["images"], resolution=_SIDE_PX)
        loader = ShardLoader(dataset, _IMAGE_BATCH, num_workers=workers)
        seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
        for _ in range(options.repeats):
            clock = time.perf_counter if workers else time.process_time
            seconds["ours"].append(_seconds(iter(loader), clock))
            loader.close()
            theirs = webdataset_batches(folder, _SIDE_PX, _IMAGE_BATCH, workers)
            seconds["theirs"].append(_seconds(theirs, clock))
        found[f"{workers} workers"] = _compared(*(_IMAGE_BATCH / min(times) for times in seconds.values()))
    return found


def _seconds(batches: Iterator[Any], clock: Callable[[], float], count: int = 8) -> float:
    """Seconds per batch, excluding the first two and thus the start of the workers."""
    for _ in islice(batches, 2):
        pass
    start = clock()
    read = sum(1 for _ in islice(batches, count))
    return (clock() - start) / read


def _compared(ours: float, theirs: float) -> dict[str, float]:
    return {"samples_per_second": ours, "webdataset_samples_per_second": theirs, "ratio": ours / theirs}


def overhead(folder: Path, options: DataOptions) -> dict[str, float]:
    """Share of a step spent waiting for latents, with steps that use no CPU, as on a GPU."""
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


def memory(folder: Path, content: Content, options: DataOptions) -> dict[str, list[float]]:
    """Memory of this process and its workers over several epochs, sampled after every tenth batch.

    Raises:
        ValueError: for fewer than four samples.
    """
    dataset = _dataset(folder, [content], resolution=_SIDE_PX if content == "images" else None)
    loader = ShardLoader(dataset, _IMAGE_BATCH, num_workers=options.workers)
    start, times, megabytes, count = time.perf_counter(), list[float](), list[float](), 0
    while time.perf_counter() - start < options.memory_seconds:
        for _ in loader:
            count += 1
            if count % 10 == 0:
                times.append(round(time.perf_counter() - start, 2))
                megabytes.append(round(_resident_mb(), 1))
            if time.perf_counter() - start > options.memory_seconds:
                break
    loader.close()
    if len(megabytes) < 4:
        raise ValueError("memory was sampled fewer than four times; raise --memory_seconds")
    return {"seconds": times, "megabytes": megabytes, "batches": [float(count)]}


def memory_growth(megabytes: Sequence[float]) -> float:
    """Ratio of the peak of the second half to that of the first, without the first fifth."""
    warm = megabytes[len(megabytes) // 5 :]
    half = len(warm) // 2
    return max(warm[half:]) / max(warm[:half])


def _resident_mb() -> float:
    """Megabytes of this process and its children; shared pages are counted once (PSS of Linux)."""

    def processes(pid: int) -> Iterator[int]:
        yield pid
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield from processes(int(child))

    total = 0
    for pid in processes(os.getpid()):
        with suppress(OSError):  # a process that has ended
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024


def _plot_memory(traces: Mapping[str, Mapping[str, Sequence[float]]], path: Path) -> None:
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    for name, line in traces.items():
        axes.plot(line["seconds"], line["megabytes"], label=name)
    axes.set(xlabel="seconds", ylabel="MB, all processes of the loader", ylim=(0, None))
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def first_batch(root: Path, shards: int, samples: int, workers: int) -> dict[str, float]:
    """Time from construction to the first batch of a run that resumes in the middle of its second epoch."""
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
    """Correlation of written and emitted position at the default window; ranks that a shard reaches in 20 epochs."""
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


def webdataset_batches(
    folder: Path, side_px: int, batch_size: int, workers: int
) -> Iterator[tuple[Tensor, Any]]:
    """Images as float tensors in [-1, 1] with captions, as in webdataset's documentation: PIL and torchvision."""
    transform = v2.Compose(
        [
            v2.Resize(side_px, interpolation=v2.InterpolationMode.BICUBIC),
            v2.CenterCrop(side_px),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )
    dataset = (
        webdataset.WebDataset(_urls(folder), shardshuffle=False, nodesplitter=None)
        .shuffle(100)
        .decode("pilrgb", handler=webdataset.handlers.reraise_exception)
        .to_tuple("jpg", "txt")
        .map_tuple(transform, lambda text: text)
        .batched(batch_size, partial=False)
    )
    yield from webdataset.WebLoader(dataset, batch_size=None, num_workers=workers)


def _urls(folder: Path) -> list[str]:
    return [str(path) for path in sorted(folder.glob("*.tar"))]


def write_tars(folder: Path, samples: int, name: str, contents: Sequence[Any]) -> Path:
    """Write shards of 250 samples like img2dataset and `data.prepare latents`; samples repeat the contents."""
    with ShardWriter(folder, samples_per_shard=250) as writer:
        for number in range(samples):
            content = {name: contents[number % len(contents)], "txt": f"a caption of some words, {number}"}
            sizes = {"original_height": _JPEG_SIDE_PX + number % 7, "original_width": _JPEG_SIDE_PX}
            writer.write(content | {"json": sizes | {"crop_top": 0, "crop_left": 0}})
    return folder


def many_shards(folder: Path, shards: int, samples: int) -> Path:
    """Hard links to one shard of tiny samples, for a large index that takes little disk space."""
    tiny = encode_latents(np.zeros((4, 1, 1), dtype=np.float32))
    with ShardWriter(folder, prefix="first-", samples_per_shard=samples) as writer:
        for number in range(samples):
            writer.write({"latent.safetensors": tiny, "txt": f"caption {number}"})
    for number in range(1, shards):
        os.link(writer.paths[0], folder / f"other-{number:05d}.tar")
    return folder


def _photograph(rng: np.random.Generator) -> bytes:
    """Smooth shapes with grain, whose compression ratio is about that of photographs."""
    small = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8))
    smooth = np.asarray(small.resize((_JPEG_SIDE_PX, _JPEG_SIDE_PX), Image.Resampling.BICUBIC)).astype(
        np.int16
    )
    grain = rng.integers(-2, 3, smooth.shape, dtype=np.int16)
    stream = io.BytesIO()
    Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=85)
    return stream.getvalue()
