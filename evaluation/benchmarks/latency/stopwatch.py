"""Times a call end to end, and its components."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Stopwatch:
    """Times calls whose components were wrapped by `watch` or stand in a `part`.

    Args:
        device: "cuda" or "cpu".
        clock: "wall" or "cpu", the process's processor time.
    """

    def __init__(self, device: str, clock: str) -> None:
        self._cuda = device == "cuda"
        self._clock: Callable[[], float] = time.perf_counter if clock == "wall" else time.process_time
        self._marks: list[tuple[str, Any, Any]] = []
        self._watching = False

    def timed(self, call: Callable[[], object]) -> dict[str, float]:
        """Seconds of a call as `end_to_end`, and of its components by name.

        On a GPU, components are events of the stream in a second call, and nothing waits for them before its end: a host that
        waited after each component would no longer prepare the next one meanwhile. On a CPU a component costs two readings of
        the clock, so one call gives both.
        """
        self._marks.clear()
        self._watching = not self._cuda
        self._synchronize()
        started = self._clock()
        call()
        self._synchronize()
        total = self._clock() - started
        if self._cuda:
            self._watching = True
            call()
            self._synchronize()
        self._watching = False
        return {**self._components(), "end_to_end": total}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Adds the time of a block to a component."""
        if not self._watching:
            yield
            return
        started = self._mark()
        yield
        self._marks.append((name, started, self._mark()))

    def watch(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """The function with its time added to a component."""

        def watched(*given: Any, **named: Any) -> Any:
            with self.part(name):
                return function(*given, **named)

        return watched

    def _components(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, started, ended in self._marks:
            seconds = started.elapsed_time(ended) / 1000 if self._cuda else ended - started
            found[name] = found.get(name, 0.0) + seconds
        return found

    def _mark(self) -> Any:
        if not self._cuda:
            return self._clock()
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _synchronize(self) -> None:
        if self._cuda:
            import torch

            torch.cuda.synchronize()
