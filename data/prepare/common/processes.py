"""Sharing the tasks of a job among processes of one machine."""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import os
import queue
import signal
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

from sdxs_lightning.core.child_process import leave_signals_to_parent, signals_ignored
from sdxs_lightning.core.errors import Interrupted, RunStopped

OnProgress = Callable[[Any], None]
"""Called with the number of items that were completed, or with a result, whatever the job's caller expects."""
RESUMES = "the same command resumes from the shards that are complete."


class Job(Protocol):
    """Work that consists of numbered tasks; pickled to every process."""

    @property
    def processes(self) -> int:
        """Upper limit of the processes that share it."""

    def work(self, process: int, tasks: Sequence[int], on_progress: OnProgress) -> None:
        """Runs some tasks.

        Args:
            process: index of this process.
            tasks: which ones.
            on_progress: reports to the process that called `run_all`; may raise to stop.

        Raises:
            RunStopped: for any error that the user can fix.
        """


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_all(job: Job, tasks: Sequence[int], on_progress: OnProgress, module: str | None = None) -> None:
    """Runs a job, in this process or in several.

    Args:
        job: what to run.
        tasks: which tasks of it; process i of n takes every n-th of them.
        on_progress: called in this process.
        module: that the processes import once for all; None takes that of the job's class.

    Raises:
        RunStopped: as soon as one process fails; the others are terminated.
        Interrupted: after Ctrl-C.
    """
    processes = min(job.processes, len(tasks))
    try:
        if processes <= 1:
            job.work(0, tasks, on_progress)
        else:
            _run_in_processes(job, processes, tasks, on_progress, module or type(job).__module__)
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; {RESUMES}", signal.SIGINT) from None


def _run_in_processes(
    job: Job, processes: int, tasks: Sequence[int], on_progress: OnProgress, module: str
) -> None:
    # CUDA does not survive a fork of this process; a fork server has not initialised it, and imports everything once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module])
    with signals_ignored():
        multiprocessing.forkserver.ensure_running()
    messages: Any = context.Queue()
    workers = [
        context.Process(target=_work, args=(job, i, tasks[i::processes], messages), daemon=True)
        for i in range(processes)
    ]
    for worker in workers:
        worker.start()
    try:
        _wait(workers, messages, on_progress)
    finally:
        for worker in workers:
            worker.kill()  # they ignore SIGTERM
            worker.join()


def _wait(workers: Sequence[BaseProcess], messages: Any, on_progress: OnProgress) -> None:
    """Forwards messages until all workers have exited with code 0."""
    while True:
        exit_codes = [worker.exitcode for worker in workers]
        try:
            stopped, content = messages.get(timeout=0.2)
        except queue.Empty:
            failed = [code for code in exit_codes if code]
            if failed:
                how = f"was killed by signal {-failed[0]}" if failed[0] < 0 else "failed, see above"
                raise RunStopped(f"a process {how}; {RESUMES}") from None
            if all(code == 0 for code in exit_codes):
                return
            continue
        if stopped is not None:
            raise stopped(content)
        on_progress(content)


def _work(job: Job, process: int, tasks: Sequence[int], messages: Any) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    leave_signals_to_parent()

    def on_progress(content: Any) -> None:
        # A command that was killed cannot terminate its processes. getppid would not tell: it is the fork server, which
        # lives as long as they do.
        if not parent.is_alive():
            os._exit(1)
        messages.put((None, content))

    try:
        job.work(process, tasks, on_progress)
    except RunStopped as stop:
        messages.put((type(stop), str(stop)))
