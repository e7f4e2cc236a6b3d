"""Speed of the metrics: the Frechet term against torchmetrics and scipy, and the exchange between ranks.

CPU seconds are recorded beside wall-clock seconds, since they are comparable on a busy machine.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from evaluation.metrics.frechet import FrechetDistance, frechet_distance
from evaluation.metrics.statistics import FeatureStatistics

if TYPE_CHECKING:
    from evaluation.benchmarks.throughput import MetricsOptions


def run(options: MetricsOptions) -> dict[str, Any]:
    """All timings of one run, in seconds, and their ratios."""
    # First, because it forks: this process must not have started threads.
    result: dict[str, Any] = {"sync": sync(options.ranks, options.dimensions, False, options.repeats)}
    if options.torchmetrics_sync:
        result["sync_of_torchmetrics"] = sync(options.ranks, options.dimensions, True, 1)
    sides = [features_like_inception(options.samples, options.dimensions, seed) for seed in (0, 1)]
    result["frechet"] = frechet_routes(sides[0], sides[1], options.repeats, True)
    few = [side[: options.few] for side in sides]
    result["frechet_few_samples"] = frechet_routes(few[0], few[1], options.repeats, False)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return result | {
        "dimensions": options.dimensions,
        "samples": options.samples,
        "few_samples": options.few,
        "threads": torch.get_num_threads(),
        "load_average": load,
    }


def features_like_inception(count: int, dimensions: int, seed: int) -> Tensor:
    """Random non-negative features (n, d) with a spectrum over five decades."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(dimensions, dimensions, generator=generator)).Q
    scales = torch.arange(1, dimensions + 1) ** -0.75
    own = torch.Generator().manual_seed(seed + 1)
    latent = torch.randn(count, dimensions, generator=own) * scales + 0.1 * seed * scales
    features: Tensor = (latent @ directions + 0.5).clamp_min(0)
    return features


def frechet_routes(features_1: Tensor, features_2: Tensor, repeats: int, slow: bool) -> dict[str, Any]:
    """Seconds and value of each implementation of the distance, from equal statistics; `slow` includes scipy's."""
    side_1, side_2 = (FeatureStatistics.from_features(side) for side in (features_1, features_2))
    tensors = (side_1.mean, side_1.covariance, side_2.mean, side_2.covariance)
    routes: dict[str, Callable[[], float]] = {
        "ours": lambda: frechet_distance(*tensors, side_1.root, side_2.root),
        "torchmetrics": lambda: _by_torchmetrics(*tensors),
    }
    if slow and find_spec("scipy") is not None:
        routes["scipy"] = lambda: _by_scipy(*tensors)
    seconds: dict[str, list[float]] = {name: [] for name in routes}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in routes}
    values: dict[str, float] = {}
    # Alternating, so that other load on the machine affects all equally.
    for repeat in range(repeats):
        for name, route in routes.items():
            if name == "scipy" and repeat > 0:
                continue  # takes half a minute
            start, cpu_start = time.perf_counter(), time.process_time()
            values[name] = route()
            seconds[name].append(time.perf_counter() - start)
            cpu_seconds[name].append(time.process_time() - cpu_start)
    found: dict[str, Any] = {"value": values}
    for kind, times in (("seconds", seconds), ("cpu_seconds", cpu_seconds)):
        fastest = {name: min(each) for name, each in times.items()}
        ratios = {name: fastest[name] / fastest["ours"] for name in routes if name != "ours"}
        found |= {kind: fastest, f"times_ours_in_{kind}": ratios}
    return found


def _by_torchmetrics(mean_1: Tensor, covariance_1: Tensor, mean_2: Tensor, covariance_2: Tensor) -> float:
    from torchmetrics.image.fid import _compute_fid

    return float(_compute_fid(mean_1, covariance_1, mean_2, covariance_2))


def _by_scipy(mean_1: Tensor, covariance_1: Tensor, mean_2: Tensor, covariance_2: Tensor) -> float:
    """Distance via scipy's sqrtm, as in pytorch-fid and clean-fid."""
    from scipy.linalg import sqrtm

    root = sqrtm(covariance_1.numpy() @ covariance_2.numpy())
    spread = covariance_1.trace() + covariance_2.trace() - 2 * float(root.trace().real)
    return float((mean_1 - mean_2).square().sum() + spread)


def sync(ranks: int, dimensions: int, of_torchmetrics: bool, repeats: int) -> dict[str, Any]:
    """Exchange of FID states between local gloo processes: slowest rank, largest memory growth."""
    # Forked where possible: a fresh process spends seconds importing torch.
    context: Any = multiprocessing.get_context("fork" if hasattr(os, "fork") else "spawn")
    queue = context.Queue()
    port = _free_port()
    arguments = (ranks, port, dimensions, of_torchmetrics, repeats, queue)
    processes = [context.Process(target=_rank, args=(rank, *arguments)) for rank in range(ranks)]
    for process in processes:
        process.start()
    found = [queue.get(timeout=600) for _ in processes]
    for process in processes:
        process.join()
    return {
        "ranks": ranks,
        "seconds": min(max(each["seconds"][repeat] for each in found) for repeat in range(repeats)),
        "cpu_seconds_of_all_ranks": min(
            sum(each["cpu"][repeat] for each in found) for repeat in range(repeats)
        ),
        "extra_mb_per_rank": max(each["extra_mb"] for each in found),
        "state_mb": 2 * dimensions**2 * 8 / 1e6,
        "cores": os.cpu_count(),
    }


def _rank(
    rank: int, ranks: int, port: int, dimensions: int, of_torchmetrics: bool, repeats: int, queue: Any
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    metric = _filled(rank, dimensions, of_torchmetrics)
    seconds, cpu, extra = [], [], 0.0
    for _ in range(repeats):
        dist.barrier()
        before = _memory_mb("VmRSS", reset=True)
        start, cpu_start = time.perf_counter(), time.process_time()
        metric.sync(distributed_available=dist.is_initialized)
        seconds.append(time.perf_counter() - start)
        cpu.append(time.process_time() - cpu_start)
        extra = max(extra, _memory_mb("VmHWM") - before)
        metric.unsync()
    queue.put({"seconds": seconds, "cpu": cpu, "extra_mb": extra})
    dist.barrier()
    dist.destroy_process_group()


def _filled(rank: int, dimensions: int, of_torchmetrics: bool) -> Any:
    """A metric of either package, both sides updated with random features."""
    generator = torch.Generator().manual_seed(rank)
    sides = [torch.randn(64, dimensions, generator=generator) for _ in range(2)]
    if of_torchmetrics:
        from torchmetrics.image.fid import FrechetInceptionDistance

        network = torch.nn.Flatten()
        network.num_features = dimensions  # type: ignore[assignment]
        metric = FrechetInceptionDistance(network)
        for real, side in enumerate(sides):
            metric.update(side, real=bool(real))
        return metric
    ours = FrechetDistance(lambda images: images, dimensions)
    ids = torch.arange(64) + 64 * rank
    for real, side in enumerate(sides):
        ours.add(side, ids, real=bool(real))
    return ours


def _memory_mb(field: str, reset: bool = False) -> float:
    """VmRSS (current) or VmHWM (peak since the reset) of this process; 0 where /proc is missing."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0.0
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in status.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
