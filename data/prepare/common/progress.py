"""Saying on stderr how far the work is: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time

_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_BETWEEN_BARS = 0.2
_BAR = 30


class Progress:
    """Counts what is done.

    Args:
        total: of things that are to be done.
        what: they are, in the plural.
    """

    def __init__(self, total: int, what: str) -> None:
        self.total, self._what, self._done = total, what, 0
        self._bar = sys.stderr.isatty()
        self._started = self._told = time.monotonic()

    def __call__(self, count: int) -> None:
        """So many more are done."""
        self._done += count
        now = time.monotonic()
        wait = _SECONDS_BETWEEN_BARS if self._bar else _SECONDS_BETWEEN_LINES
        if now - self._told < wait and self._done < self.total:
            return
        self._told = now
        rate = self._done / max(now - self._started, 1e-9)
        left = (self.total - self._done) / max(rate, 1e-9)
        said = f"{self._what}: {self._done} of {self.total}, {rate:.3g} a second, {left:.0f} s left"
        if not self._bar:
            sys.stderr.write(f"{said}\n")
            return
        full = _BAR * self._done // max(self.total, 1)
        end = "\n" if self._done >= self.total else ""
        # Back to the start of the line, and what an earlier and longer line left is wiped out.
        sys.stderr.write(f"\r[{'#' * full}{'.' * (_BAR - full)}] {said}\x1b[K{end}")
        sys.stderr.flush()
