"""Helper processes of a run, which leave signal handling to their parent and end with it.

SLURM, Kubernetes and Ctrl-C signal every process of a run. A data loading worker that dies of SIGTERM would end the run before
the trainer has saved the checkpoint that the signal asks for.
"""

import atexit
import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""Signals by which a scheduler or a user ends a run."""
_PR_SET_PDEATHSIG = 1


def leave_signals_to_parent(worker_id: int = 0) -> None:
    """Makes this process ignore `SIGNALS` and end with its parent. Call it first in a helper process.

    Child processes inherit the ignored signals; only SIGKILL ends the process.

    Args:
        worker_id: unused; passed by a DataLoader to its worker_init_fn.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        # The parent of a fork server's child is the server, which ends with the process that started it.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():  # it died before prctl
        os._exit(1)


@contextmanager
def signals_ignored() -> Iterator[None]:
    """Context in which started processes, such as a fork server, permanently ignore `SIGNALS`."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def kill_children_at_exit() -> None:
    """Kills daemonic children at exit; multiprocessing would send SIGTERM, which they ignore, and wait forever."""
    global _registered
    if not _registered:
        _registered = True
        atexit.register(_kill_children)


_registered = False


def _kill_children() -> None:
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
