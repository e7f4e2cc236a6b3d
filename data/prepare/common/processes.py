"""Sharing the parts of a job among processes of one machine."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

from sdxs_lightning.core.errors import Interrupted, RunStopped

Told = Callable[[Any], None]
_GOES_ON = "the same command goes on from the shards that are there."


class Job(Protocol):
    """Work that falls into numbered parts; travels to every process by pickling."""

    @property
    def processes(self) -> int:
        """At most so many."""

    def work(self, process: int, parts: Sequence[int], told: Told) -> None:
        """Does some parts.

        Args:
            process: its number, from 0.
            parts: which ones.
            told: takes news for the process that asked: a number of things that are done, or whatever else it
                understands. May raise to stop.

        Raises:
            RunStopped: for whatever the user can mend.
        """


def run_all(job: Job, parts: Sequence[int], told: Told) -> None:
    """Does a job, in this process or in several.

    Args:
        job: what is to be done.
        parts: which parts of it; process i takes every n-th of them.
        told: called here with the news.

    Raises:
        RunStopped: as soon as one process cannot go on; the others are ended.
        Interrupted: after Ctrl-C.
    """
    processes = min(job.processes, len(parts))
    try:
        if processes <= 1:
            job.work(0, parts, told)
        else:
            _share(job, processes, parts, told)
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; {_GOES_ON}", signal.SIGINT) from None


def _share(job: Job, processes: int, parts: Sequence[int], told: Told) -> None:
    # CUDA does not survive a fork of this process; a fork server has not touched it, and imports everything once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([type(job).__module__])
    heard: Any = context.Queue()
    workers = [
        context.Process(target=_work, args=(job, i, parts[i::processes], heard), daemon=True)
        for i in range(processes)
    ]
    for worker in workers:
        worker.start()
    try:
        _listen(workers, heard, told)
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()


def _listen(workers: Sequence[BaseProcess], heard: Any, told: Told) -> None:
    """Until all have ended well."""
    while True:
        ended = [worker.exitcode for worker in workers]
        try:
            stop, news = heard.get(timeout=0.2)
        except queue.Empty:
            bad = [code for code in ended if code]
            if bad:
                how = f"was killed by signal {-bad[0]}" if bad[0] < 0 else "failed, as told above"
                raise RunStopped(f"a process {how}; {_GOES_ON}") from None
            if all(code == 0 for code in ended):
                return
            continue
        if stop is not None:
            raise stop(news)
        told(news)


def _work(job: Job, process: int, parts: Sequence[int], heard: Any) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the parent ends this one

    def told(news: Any) -> None:
        # A command that was killed cannot end its processes. Not getppid: that is the fork server, which lives on with them.
        if not parent.is_alive():
            os._exit(1)
        heard.put((None, news))

    try:
        job.work(process, parts, told)
    except RunStopped as stop:
        heard.put((type(stop), str(stop)))
