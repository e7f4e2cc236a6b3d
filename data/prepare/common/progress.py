"""Progress on stderr: a bar on a terminal, otherwise a line every ten seconds."""

from __future__ import annotations

import sys
import time

_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_BETWEEN_BARS = 0.2
_BAR = 30


class CommandProgress:
    """Counts completed items.

    Args:
        total: number of items.
        items: their name, in the plural.
    """

    def __init__(self, total: int, items: str) -> None:
        self.total, self._items, self._done = total, items, 0
        self._bar = sys.stderr.isatty()
        self._started = self._shown = time.monotonic()

    def __call__(self, count: int) -> None:
        """Adds completed items."""
        self._done += count
        now = time.monotonic()
        wait = _SECONDS_BETWEEN_BARS if self._bar else _SECONDS_BETWEEN_LINES
        if now - self._shown < wait and self._done < self.total:
            return
        self._shown = now
        rate = self._done / max(now - self._started, 1e-9)
        left = (self.total - self._done) / max(rate, 1e-9)
        text = f"{self._items}: {self._done} of {self.total}, {rate:.3g} a second, {left:.0f} s left"
        if not self._bar:
            sys.stderr.write(f"{text}\n")
            return
        full = _BAR * self._done // max(self.total, 1)
        end = "\n" if self._done >= self.total else ""
        # Back to the start of the line; the escape sequence clears what an earlier and longer line left.
        sys.stderr.write(f"\r[{'#' * full}{'.' * (_BAR - full)}] {text}\x1b[K{end}")
        sys.stderr.flush()
