"""Memory of a training's loader against time: this process and its reading processes together."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt


def resident_mb() -> float:
    """Megabytes of this process and its children; pages that several share are counted once (PSS of Linux)."""
    return sum(_proportional_kb(pid) for pid in _family(os.getpid())) / 1024


def trace(batches: Iterable[Any], seconds: float, every: int) -> dict[str, list[float]]:
    """Read batches for a while and look at the memory after every so many of them."""
    start = time.perf_counter()
    times, megabytes, count = list[float](), list[float](), 0
    for count, _ in enumerate(batches, 1):
        if count % every == 0:
            times.append(round(time.perf_counter() - start, 2))
            megabytes.append(round(resident_mb(), 1))
        if time.perf_counter() - start > seconds:
            break
    return {"seconds": times, "megabytes": megabytes, "batches": [float(count)]}


def growth(megabytes: list[float]) -> float:
    """Peak of the second half over peak of the first, once the loader has warmed up."""
    if len(megabytes) < 4:
        raise ValueError("Memory was looked at fewer than four times; give --memory_seconds more.")
    warm = megabytes[len(megabytes) // 5 :]
    half = len(warm) // 2
    return max(warm[half:]) / max(warm[:half])


def plot(traces: dict[str, dict[str, list[float]]], path: Path) -> None:
    """One line for each."""
    figure, axes = plt.subplots(figsize=(6, 3.2))
    for name, line in traces.items():
        axes.plot(line["seconds"], line["megabytes"], label=name)
    axes.set(xlabel="seconds", ylabel="MB, all processes of the loader")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _proportional_kb(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0  # it has ended
    return next((int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:")), 0)


def _family(pid: int) -> list[int]:
    children: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        children += [int(child) for child in (task / "children").read_text().split()]
    return [pid, *(member for child in children for member in _family(child))]
