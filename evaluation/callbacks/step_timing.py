"""Where the time of a training step goes: the step by kind of iteration, collectives, and waiting for data.

Nothing waits for the device between two readings: spans lie between CUDA events, which are read together.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
import torch.distributed as dist

COLLECTIVES = (
    "all_reduce",
    "all_gather_into_tensor",
    "reduce_scatter_tensor",
    # their names from torch 2.15 on, by which FSDP2 calls them
    "all_gather_single",
    "reduce_scatter_single",
)
"""Functions of torch.distributed that a training step calls."""
FETCH = "train_dataloader_next"
"""Lightning's name, for profilers, of waiting for the next batch."""

Mark = float | torch.cuda.Event


class Span(NamedTuple):
    """Spans of one name since the last reading."""

    seconds: float
    number: int


class Stopwatch:
    """Spans between marks on the current stream of a GPU, or of the host's clock on a CPU.

    Args:
        device: of the training.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spans: dict[str, list[tuple[Mark, Mark]]] = defaultdict(list)

    def mark(self) -> Mark:
        """Now, on the current stream; does not wait for the device."""
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(self, name: str, start: Mark, end: Mark) -> None:
        """Counts a span."""
        self._spans[name].append((start, end))

    def read(self) -> dict[str, Span]:
        """The sums by name since the last reading. Waits for the device."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        read = {
            name: Span(sum(_seconds(start, end) for start, end in spans), len(spans))
            for name, spans in self._spans.items()
        }
        self._spans.clear()
        return read


def _seconds(start: Mark, end: Mark) -> float:
    if isinstance(start, torch.cuda.Event):
        assert isinstance(end, torch.cuda.Event)
        return float(start.elapsed_time(end)) / 1000
    assert isinstance(end, float)
    return end - start


class TimedCollectives:
    """Measures how long streams wait for collectives, while it is `on`.

    A collective of the current stream, as those of DDP's averaging and of FSDP2's own streams, counts from its call to its
    end; one with `async_op` counts while its `wait` holds up the stream. Under FSDP2 most of it overlaps with computation.

    Args:
        watch: gets the spans.
        name: of the spans.
    """

    def __init__(self, watch: Stopwatch, name: str) -> None:
        self.on = False
        self._watch, self._name = watch, name
        self._originals: dict[str, Callable[..., Any]] = {}

    def install(self) -> None:
        """Wraps the functions of torch.distributed, which offers no hook for them."""
        for name in COLLECTIVES:
            if (original := getattr(dist, name, None)) is not None:
                self._originals[name] = original
                setattr(dist, name, self._timed(original))

    def remove(self) -> None:
        """Puts the functions back. Idempotent."""
        for name, original in self._originals.items():
            setattr(dist, name, original)
        self._originals.clear()

    def _timed(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def collective(*args: Any, **kwargs: Any) -> Any:
            if not self.on:
                return original(*args, **kwargs)
            start = self._watch.mark()
            work = original(*args, **kwargs)
            if work is not None:
                return _TimedWork(work, self._watch, self._name)
            self._watch.add(self._name, start, self._watch.mark())
            return None

        return collective


class _TimedWork:
    """A handle of an asynchronous collective whose `wait` is measured."""

    def __init__(self, work: Any, watch: Stopwatch, name: str) -> None:
        self._work, self._watch, self._name = work, watch, name

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        start = self._watch.mark()
        result = self._work.wait(*args, **kwargs)
        self._watch.add(self._name, start, self._watch.mark())
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


class FetchTimer:
    """Seconds that the host waits for batches, from Lightning's calls of its profiler.

    Args:
        trainer: whose profiler is listened to; it may be any.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self.seconds = 0.0
        self._began = 0.0
        self._profiler: Any = trainer.profiler  # type: ignore[attr-defined]  # set by a connector
        start, stop = self._profiler.start, self._profiler.stop

        def timed_start(action: str) -> None:
            start(action)
            if action.endswith(FETCH):
                self._began = time.perf_counter()

        def timed_stop(action: str) -> None:
            if action.endswith(FETCH):
                self.seconds += time.perf_counter() - self._began
            stop(action)

        self._profiler.start, self._profiler.stop = timed_start, timed_stop

    def remove(self) -> None:
        """Listens no longer. Idempotent."""
        vars(self._profiler).pop("start", None)
        vars(self._profiler).pop("stop", None)

    def read(self) -> float:
        """The seconds since the last reading."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds
