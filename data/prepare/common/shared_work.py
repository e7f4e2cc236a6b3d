"""Who makes the missing shards of a set: processes of this machine or tasks of a Ray cluster, and beside them whatever other
commands with the same --out.

Everyone claims a shard before making it (`claims`); a job only ever sees the shards that its process has claimed.
"""

from __future__ import annotations

import signal
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Protocol

from data.prepare.common.claims import Claims, ShardEnd, ShardTask, claimed
from data.prepare.common.machine import choose_device, default_processes
from data.prepare.common.options import DeviceOptions
from data.prepare.common.processes import RESUMES, OnProgress, run_all
from data.prepare.common.progress import CommandProgress
from data.prepare.common.set_folder import SetFolder
from sdxs_lightning.core.errors import Interrupted


class ShardJob(Protocol):
    """Makes shards of a set; pickled to every process."""

    @property
    def folder(self) -> SetFolder:
        """Of the set."""

    def is_complete(self, shard: int) -> bool:
        """Whether a shard need not be made."""

    def work(self, process: int, tasks: Iterable[ShardTask], on_progress: OnProgress) -> None:
        """Makes some shards.

        Args:
            process: index of this process, which chooses its GPU.
            tasks: shards to make. A shard stays claimed until the next one is asked for, and it may take long until that comes.
            on_progress: called with numbers of samples that were read.

        Raises:
            RunStopped: for any error that the user can fix.
        """


class SetProgress:
    """Counts samples of the missing shards, whoever reads them.

    Args:
        samples: of each missing shard.
        items: their name, in the plural.
    """

    def __init__(self, samples: Mapping[int, int], items: str) -> None:
        self.read = 0
        """Samples that this command read."""
        self._samples, self._here, self._elsewhere = samples, set[int](), set[int]()
        self._progress = CommandProgress(sum(samples.values()), items)

    def __call__(self, content: int | ShardEnd) -> None:
        """Adds samples that were read, or a shard that is complete."""
        if isinstance(content, int):
            self.read += content
            self._progress(content)
        elif content.here:
            self._here.add(content.number)
            if content.number in self._elsewhere:  # another process of this command saw it first
                self._elsewhere.remove(content.number)
                self._progress(-self._samples[content.number])
        elif content.number not in self._here | self._elsewhere:
            self._elsewhere.add(content.number)
            self._progress(self._samples[content.number])


class Workforce(ABC):
    """Processes that make shards."""

    device: str
    """Of their networks, "cpu" or "cuda"."""
    processes: int
    """On one machine, at most."""

    @abstractmethod
    def make(self, job: ShardJob, shards: Sequence[int], on_progress: SetProgress) -> None:
        """Makes shards, each unless someone else does; returns when all are complete.

        Raises:
            RunStopped: as soon as one cannot be made.
            Interrupted: after Ctrl-C.
        """


class LocalProcesses(Workforce):
    """Processes of this machine.

    Args:
        device: "cpu" or "cuda".
        processes: at most.
    """

    def __init__(self, device: str, processes: int) -> None:
        self.device, self.processes = device, processes

    @classmethod
    def of(cls, options: DeviceOptions, network: bool) -> LocalProcesses:
        """As the options of a command say; a job without a network needs no GPU."""
        device = choose_device(options.device) if network else "cpu"
        return cls(device, options.processes or default_processes(device))

    def make(self, job: ShardJob, shards: Sequence[int], on_progress: SetProgress) -> None:
        processes = min(self.processes, len(shards))
        claiming = _ClaimingJob(job, tuple(shards), processes)
        run_all(claiming, range(processes), on_progress, type(job).__module__)


@dataclass(frozen=True)
class _ClaimingJob:
    """A `processes.Job` whose processes each go through all shards, and make those that they can claim."""

    job: ShardJob
    shards: tuple[int, ...]
    processes: int

    def work(self, process: int, tasks: Sequence[int], on_progress: OnProgress) -> None:
        claims = Claims(self.job.folder)
        for _ in tasks:  # the process's number
            with closing(claimed(claims, self.shards, self.job.is_complete, on_progress)) as shards:
                self.job.work(process, shards, on_progress)


@contextmanager
def workforce(options: DeviceOptions, network: bool = True) -> Iterator[Workforce]:
    """What the options ask for: Ray, or this machine.

    Args:
        options: of the command.
        network: whether the job runs a network; without one it needs no GPU.

    Raises:
        UserError: for hardware that is not there.
        Interrupted: after Ctrl-C.
    """
    try:
        if options.ray is None:
            yield LocalProcesses.of(options, network)
        else:
            from data.prepare.common.ray_cluster import ray_cluster

            with ray_cluster(options, network) as cluster:
                yield cluster
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; {RESUMES}", signal.SIGINT) from None
