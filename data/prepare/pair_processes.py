"""Sharing the shards of a set of pairs among processes, one a GPU."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from data.prepare.pair_sampler import PairSampler
from data.prepare.pair_settings import PairSettings
from data.prepare.pair_shards import make_shards
from data.prepare.prompts import open_prompts
from sdxs_lightning.checkpoint_folder import write_failure
from sdxs_lightning.errors import CheckpointNotWritten, RunStopped, UserError

Told = Callable[[int], None]


@contextmanager
def same_bits(device: str) -> Iterator[None]:
    """Inside, a CPU samples the same bits whatever the number of processes: with one thread, since sums over several are
    cut elsewhere.
    """
    before = torch.get_num_threads()
    if device == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def default_processes(device: str) -> int:
    """One a GPU; without any, one a core, but no more than 8: each holds the networks."""
    if device == "cuda":
        return torch.cuda.device_count()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 8)


@dataclass(frozen=True)
class PairJob:
    """What every process has to know."""

    settings: PairSettings
    folder: Path
    batch_size: int
    device: str
    """ "cpu" or "cuda"."""
    processes: int

    def device_of(self, process: int) -> torch.device:
        """The GPUs are dealt out in turn."""
        if self.device == "cpu":
            return torch.device("cpu")
        return torch.device("cuda", process % torch.cuda.device_count())


def make_all(job: PairJob, shards: Sequence[int], told: Told) -> None:
    """Makes shards, in this process or in several.

    Args:
        job: the set, the folder, the machine.
        shards: which ones; process i takes every n-th of them.
        told: called here with numbers of pairs that were made.

    Raises:
        RunStopped: as soon as one process cannot go on; the others are ended.
    """
    processes = min(job.processes, len(shards))
    if processes <= 1:
        _make(job, 0, shards, told)
        return
    # CUDA does not survive a fork of this process; a fork server has not touched it, and imports everything once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    heard: Any = context.Queue()
    workers = [
        context.Process(target=_work, args=(job, i, shards[i::processes], heard), daemon=True)
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
            news = heard.get(timeout=0.2)
        except queue.Empty:
            bad = [code for code in ended if code]
            if bad:
                how = f"was killed by signal {-bad[0]}" if bad[0] < 0 else "failed, as told above"
                raise RunStopped(
                    f"a process {how}; the same command goes on from the shards that are there."
                ) from None
            if all(code == 0 for code in ended):
                return
            continue
        if isinstance(news, int):
            told(news)
        else:
            kind, message = news
            raise kind(message)


def _work(job: PairJob, process: int, shards: Sequence[int], heard: Any) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the parent ends this one

    def told(count: int) -> None:
        # A command that was killed cannot end its processes. Not getppid: that is the fork server, which lives on with them.
        if not parent.is_alive():
            os._exit(1)
        heard.put(count)

    try:
        _make(job, process, shards, told)
    except RunStopped as stop:
        heard.put((type(stop), str(stop)))


def _make(job: PairJob, process: int, shards: Sequence[int], told: Told) -> None:
    torch.backends.cudnn.deterministic = True
    with same_bits(job.device):
        try:
            sampler = PairSampler(job.settings, open_prompts(job.settings.captions), job.device_of(process))
        except (OSError, ValueError) as error:
            raise UserError(f"--model or --unet: {error}") from error
        try:
            make_shards(sampler, job.folder, shards, job.batch_size, told)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"{job.batch_size} pairs at once do not fit the GPU; give a smaller --batch-size ({error})."
            ) from error
        except OSError as error:
            raise CheckpointNotWritten(
                f"a shard could not be written to '{job.folder}': {write_failure(error)}."
            ) from error
