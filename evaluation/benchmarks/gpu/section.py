"""One section, in a process of its own."""

from __future__ import annotations

import importlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass
class SectionRun:
    """Inputs of a section, and its results."""

    rows: Path
    """JSON lines; each row is on the disk as soon as it is added."""
    seconds: float
    """Until the process is killed."""
    device: torch.device
    tiny: bool
    started: float = field(default_factory=time.monotonic)

    def add(self, **row: Any) -> None:
        """Writes a row."""
        with self.rows.open("a") as file:
            file.write(json.dumps(row) + "\n")

    @property
    def left(self) -> float:
        """Seconds until the process is killed."""
        return self.seconds - (time.monotonic() - self.started)

    def attempt(self, measure: Callable[[], dict[str, Any]], **labels: Any) -> dict[str, Any]:
        """Adds a row of labels and what `measure` returns; an error becomes the row's `error` and ends nothing else."""
        try:
            found = measure()
        except (RuntimeError, ValueError, ImportError) as error:  # OutOfMemoryError is a RuntimeError
            found = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
        self.add(**labels, **found)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return found


def seconds_of(function: Callable[[], object], device: torch.device, repeats: int, warmups: int = 2) -> float:
    """Median seconds of a call, by CUDA events on a GPU."""
    for _ in range(warmups):
        function()
    if device.type != "cuda":
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
        return sorted(times)[len(times) // 2]
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)
    ]
    for start_event, end_event in events:
        start_event.record()
        function()
        end_event.record()
    torch.cuda.synchronize()
    milliseconds: list[float] = sorted(
        start_event.elapsed_time(end_event) for start_event, end_event in events
    )
    return milliseconds[len(milliseconds) // 2] / 1000


def bf16_peak(run: SectionRun) -> float:
    """TFLOP/s of a large bfloat16 matrix product: what model FLOPs utilisation is relative to."""
    size = 256 if run.tiny else 8192
    left, right = (torch.randn(size, size, device=run.device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / seconds_of(lambda: left @ right, run.device, repeats=10) / 1e12


def run_section(implementation: str, rows: Path, seconds: float, device: str, tiny: bool, log: Path) -> None:
    """Body of a section's process.

    Args:
        implementation: dotted path of a function that takes a `SectionRun`.
        rows: file for the rows.
        seconds: until the process is killed.
        device: "cuda" or "cpu".
        tiny: tiny networks, few repetitions.
        log: file that takes stdout and stderr.
    """
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    module, _, function = implementation.rpartition(".")
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    run = SectionRun(rows, seconds, torch.device(device), tiny)
    getattr(importlib.import_module(module), function)(run)
