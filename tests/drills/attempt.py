"""A drill in a process of its own, which ends in time, and with it everything that it started."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

from tests.drills.runs import FAILED, LEFT_OUT, CannotRun, Outcome, Runs, verdict

SECONDS = 900.0
"""Bound of a drill; on two idle cores the longest takes two minutes."""
MARK = "SDXS_DRILL"
"""Environment variable by which the processes of a drill are found, in whatever group they are."""
Drills = Mapping[str, Callable[[Runs], Outcome]]
_NUMBERS = itertools.count()
# A new interpreter would import torch for each drill; this process has no other threads, so that it can be forked.
_FORK = multiprocessing.get_context("fork")


class Attempt:
    """Starts a drill.

    Args:
        drill: what to run.
        seconds: after them it is ended, and has failed.
    """

    def __init__(self, drill: Callable[[Runs], Outcome], seconds: float = SECONDS) -> None:
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self._mark = f"{os.getpid()}-{next(_NUMBERS)}"
        self._seconds, self._start = seconds, time.monotonic()
        self._result, send = _FORK.Pipe(duplex=False)
        self._process = _FORK.Process(target=_attempt, args=(drill, self._folder.name, self._mark, send))
        self._process.start()
        send.close()

    def outcome(self) -> Outcome | None:
        """What came of it; None as long as it goes on. Waits for a moment."""
        if self._result.poll(0.2):
            try:
                outcome: Outcome = self._result.recv()
            except EOFError:
                outcome = Outcome("no error", "its process died", "")
        elif time.monotonic() - self._start < self._seconds:
            return None
        else:
            outcome = Outcome("over in time", f"not over after {self._seconds:.0f} s", "")
        self.end()
        return outcome

    def end(self) -> None:
        """Ends it: first its process, which ends what it started, then by force what is left."""
        self._process.terminate()
        self._process.join(30)
        self._process.kill()
        self._process.join()
        end = time.monotonic() + 30
        while (left := processes_with(MARK, self._mark)) and time.monotonic() < end:
            for process in left:
                with suppress(OSError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.1)
        self._folder.cleanup()


def _attempt(drill: Callable[[Runs], Outcome], folder: str, mark: str, result: Connection) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    os.environ[MARK] = mark
    try:
        with Runs(Path(folder).resolve()) as runs:
            outcome = drill(runs)
    except CannotRun as reason:
        outcome = Outcome("", f"{LEFT_OUT}: {reason}", "")
    except Exception as error:
        outcome = Outcome("no error", f"{type(error).__name__}: {error}", traceback.format_exc())
    result.send(outcome)


def processes_with(variable: str, value: str) -> list[int]:
    """Processes that were started with an environment variable of this value."""
    wanted, found = f"{variable}={value}".encode(), []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if wanted in environ.read_bytes().split(b"\0"):
                found.append(int(environ.parent.name))
    return found


def run_beside(
    lanes: list[Drills], say: Callable[[str, Outcome, float], None], end: float, tries: int = 1
) -> dict[str, Outcome]:
    """Runs lanes of drills beside each other, those of a lane in turn.

    Args:
        lanes: drills by name.
        say: is given the name, outcome and seconds of each attempt.
        end: time (`time.monotonic`) at which what goes on is ended; it is left out, as what still waits is.
        tries: so often a drill is run that comes out otherwise than wanted.
    """
    outcomes: dict[str, Outcome] = {}
    waiting = [list(lane) for lane in lanes]
    running: dict[int, tuple[str, Attempt, float]] = {}
    attempts = Counter[str]()
    try:
        while any(waiting) or running:
            late = time.monotonic() > end
            for number in range(len(lanes)):
                if number not in running and waiting[number]:
                    name = waiting[number].pop(0)
                    if late:
                        nothing = Outcome("", f"{LEFT_OUT}: no time was left", "")
                        outcomes.setdefault(name, nothing)  # one that failed before has failed
                        say(name, nothing, 0)
                    else:
                        running[number] = name, Attempt(lanes[number][name]), time.monotonic()
            for number, (name, attempt, start) in list(running.items()):
                outcome = attempt.outcome()
                if outcome is None and late:
                    attempt.end()
                    outcome = outcomes.get(name) or Outcome(
                        "", f"{LEFT_OUT}: the time for all drills was over", ""
                    )
                if outcome is not None:
                    del running[number]
                    outcomes[name] = outcome
                    attempts[name] += 1
                    say(name, outcome, time.monotonic() - start)
                    if verdict(outcome) == FAILED and attempts[name] < tries:
                        waiting[number].insert(0, name)
    finally:
        for _, attempt, _ in running.values():
            attempt.end()
    return outcomes
