"""One section, in a process of its own."""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sdxs_lightning.core.errors import UserError

Row = dict[str, Any]
"""A row's `labels` say what was measured; its other entries are what came out, or an `error`."""


class Task(NamedTuple):
    """Inputs of a section's process; all can be written as JSON."""

    implementation: str
    """Dotted path of a function that takes a `SectionRun`."""
    rows: str
    """File for the rows."""
    seconds: float
    """Until the process is killed."""
    expected_seconds: float
    device: str
    """ "cuda" or "cpu"."""
    tiny: bool
    log: str
    """File that takes stdout and stderr."""
    files: str
    """Folder for what the section leaves besides rows."""
    known: list[Row]
    """Rows of an earlier run that are not measured again."""


@dataclass
class SectionRun:
    """Inputs of a section, and its results."""

    rows: Path
    """JSON lines; each row is on the disk as soon as it is added."""
    seconds: float
    """Until the process is killed."""
    expected_seconds: float
    device: torch.device
    tiny: bool
    files: Path
    """Folder for what the section leaves besides rows; it need not exist."""
    known: list[Row] = field(default_factory=list)
    """Rows of an earlier run that are not measured again."""
    started: float = field(default_factory=time.monotonic)
    _added: list[Row] = field(default_factory=list)

    def add(self, labels: dict[str, Any], **measured: Any) -> None:
        """Writes a row."""
        row = {"labels": labels, **measured}
        self._added.append(row)
        self._write(row)

    @property
    def left(self) -> float:
        """Seconds until the process is killed."""
        return self.seconds - (time.monotonic() - self.started)

    @property
    def expected_left(self) -> float:
        """Seconds until other sections are waiting for their turn."""
        return min(self.left, self.expected_seconds - (time.monotonic() - self.started))

    def measured(self, **labels: Any) -> Row | None:
        """The row of these labels, of this run or an earlier one; None if it failed or is missing."""
        found = (row for row in [*self.known, *self._added] if row["labels"] == labels and "error" not in row)
        return next(found, None)

    def attempt(self, measure: Callable[[], dict[str, Any]], **labels: Any) -> None:
        """Adds a row of labels and what `measure` returns; an error becomes the row's `error` and ends nothing else."""
        if any(row["labels"] == labels for row in self.known):
            return
        self._write({"begun": labels})
        try:
            found = measure()
        except (RuntimeError, ValueError, TypeError, ImportError, UserError) as error:
            # torch.OutOfMemoryError is a RuntimeError, and so are the compiler's.
            found = {"error": f"{type(error).__name__}: {str(error).strip()[:400]}"}
        self.add(labels, **found)
        if self.device.type == "cuda":
            if "torch._dynamo" in sys.modules:
                torch._dynamo.reset()  # compiled graphs hold the network that they were made for
            gc.collect()  # so do Lightning's modules, which know each other
            torch.cuda.empty_cache()

    def _write(self, line: dict[str, Any]) -> None:
        with self.rows.open("a") as file:
            file.write(json.dumps(line) + "\n")


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


def run_section(task: Task) -> None:
    """Body of a section's process, which becomes the leader of a session of its own, so that its children end with it."""
    if os.getsid(0) != os.getpid():
        os.setsid()
        descriptor = os.open(task.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
    if task.device != "cpu" and torch.cuda._is_in_bad_fork():
        # diffusers (from 0.40) asks for GPUs when it is imported, which CUDA takes for its start; a fork of that process
        # cannot use a GPU. The same process goes on with a new interpreter.
        os.execv(sys.executable, [sys.executable, "-m", __name__, json.dumps(task)])
    module, _, function = task.implementation.rpartition(".")
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    run = SectionRun(
        Path(task.rows),
        task.seconds,
        task.expected_seconds,
        torch.device(task.device),
        task.tiny,
        Path(task.files),
        task.known,
    )
    getattr(importlib.import_module(module), function)(run)


if __name__ == "__main__":
    run_section(Task(*json.loads(sys.argv[1])))
