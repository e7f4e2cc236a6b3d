"""Helper processes of a run: signals are their parent's affair, and they end when it does.

SLURM, Kubernetes and Ctrl-C signal every process of a run. A reading worker that dies of SIGTERM takes the run with it,
before the trainer has saved the checkpoint that the signal asks for.
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
"""What a scheduler or a user sends to end a run."""
_PR_SET_PDEATHSIG = 1


def leave_signals_to_parent(worker_id: int = 0) -> None:
    """Makes this process ignore `SIGNALS` and end with its parent. To be called first in a helper process.

    Programs that it starts inherit both; whoever ends it has to use SIGKILL.

    Args:
        worker_id: not used; a DataLoader's worker_init_fn gets one.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        # Of a fork server's child the parent is the server, which ends with the process that started it.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():  # it died before prctl
        os._exit(1)


@contextmanager
def signals_ignored() -> Iterator[None]:
    """Inside, a program that is started ignores `SIGNALS` for good: a fork server, for instance."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def kill_children_at_exit() -> None:
    """Ends this process's helpers by SIGKILL when it exits; multiprocessing would send SIGTERM and wait for ever."""
    global _registered
    if not _registered:
        _registered = True
        atexit.register(_kill_children)


_registered = False


def _kill_children() -> None:
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
