"""Makes shards in tasks of a Ray cluster (optional extra `ray`).

One task is one shard. Ray runs it where its CPU and GPUs are free, and again elsewhere if its node dies. A process of Ray that
has done one task of a job keeps the job's networks for the next. Nodes see the set's folder, source and models at the paths of
the command, and run the same environment.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from data.prepare.common.claims import POLL_SECONDS, Claims, ShardEnd, ShardTask, try_task
from data.prepare.common.options import DeviceOptions
from data.prepare.common.processes import RESUMES
from data.prepare.common.shared_work import SetProgress, ShardJob, Workforce
from sdxs_lightning.core.errors import RunStopped, UserError

_NODE_FAILURES = 5
"""Nodes or processes that a task may lose before the command gives up."""
_IN_FLIGHT = 1000
"""Tasks that Ray knows at once: enough to keep a large cluster busy, and for an autoscaler to see what is wanted."""
_MADE, _ELSEWHERE, _BUSY = "made", "elsewhere", "busy"


class _Outcome(NamedTuple):
    """Of a task."""

    what: str
    """One of the above."""
    samples: int = 0
    stopped: RunStopped | None = None


@contextmanager
def ray_cluster(options: DeviceOptions, network: bool) -> Iterator[RayCluster]:
    """Connects to a cluster, or starts one on this machine.

    Args:
        options: its address, device and GPUs of a task.
        network: whether the job runs a network; without one it needs no GPU.

    Raises:
        UserError: without the extra, for a cluster that does not answer, or that lacks the GPUs.
    """
    assert options.ray is not None
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no telemetry
    # Ray's coming default, and its present one warns: CUDA_VISIBLE_DEVICES of a task without GPUs is left alone.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Under `uv run` Ray would start the tasks by `uv run` in a copy of the working folder, where --no-sync finds no packages
    # and Ray waits for ever. The nodes have the environment.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    try:
        import ray
    except ImportError:
        raise UserError("--ray needs the extra ray: `uv sync --extra ray`, or `pip install ray`.") from None
    address = None if options.ray == "auto" else options.ray
    try:
        ray.init(address, log_to_driver=False, logging_level="ERROR", configure_logging=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UserError(f"--ray '{options.ray}': no cluster answers there ({error}).") from error
    try:
        yield RayCluster(options, network)
    finally:
        ray.shutdown()


class RayCluster(Workforce):
    """The cluster that this process is connected to.

    Args:
        options: device, and GPUs of a task.
        network: whether the job runs a network; without one it needs no GPU.

    Raises:
        UserError: if no node has the GPUs of a task.
    """

    def __init__(self, options: DeviceOptions, network: bool) -> None:
        import ray

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        most = max((node.get("GPU", 0.0) for node in nodes), default=0.0)
        wanted = options.gpus_per_task
        if wanted is None:
            wanted = 1.0 if options.device == "cuda" or (options.device == "auto" and most) else 0.0
        self._gpus = wanted if network else 0.0
        if self._gpus > most:
            raise UserError(
                f"a task asks for {self._gpus:g} GPUs and the largest of {len(nodes)} nodes of the Ray cluster has {most:g}; "
                "change --gpus_per_task or give --device cpu."
            )
        self.device = "cuda" if self._gpus else "cpu"
        # Divides the cores of a node for threads that decode images.
        rooms = [node.get("GPU", 0.0) / self._gpus if self._gpus else node.get("CPU", 1.0) for node in nodes]
        self.processes = max(1, int(max(rooms)))

    def make(self, job: ShardJob, shards: Sequence[int], on_progress: SetProgress) -> None:
        import ray

        # GPU tasks end their process by default, and with it the networks.
        task = ray.remote(max_calls=0, max_retries=_NODE_FAILURES)(_make)
        task = task.options(num_cpus=1, num_gpus=self._gpus)
        key, shared, here = os.urandom(8).hex(), ray.put(job), os.getcwd()
        waiting, running = list(reversed(shards)), dict[Any, int]()
        busy: list[tuple[float, int]] = []
        while waiting or running or busy:
            now = time.monotonic()
            waiting += [shard for at, shard in busy if at <= now]
            busy = [(at, shard) for at, shard in busy if at > now]
            while waiting and len(running) < _IN_FLIGHT:
                shard = waiting.pop()
                running[task.remote(key, [shared], shard, here)] = shard
            done, _ = ray.wait(list(running), num_returns=1, timeout=POLL_SECONDS) if running else ([], [])
            if not running:
                time.sleep(POLL_SECONDS)
            for one in done:
                shard = running.pop(one)
                outcome = _result(one, shard)
                if outcome.what == _BUSY:
                    # Another command has it, or a dead node had.
                    busy.append((time.monotonic() + 2 * POLL_SECONDS, shard))
                    continue
                if outcome.what == _MADE:
                    on_progress(outcome.samples)
                on_progress(ShardEnd(shard, outcome.what == _MADE))


def _result(reference: Any, shard: int) -> _Outcome:
    """What a task returned.

    Raises:
        RunStopped: as the task, or if its process died again and again.
    """
    import ray

    try:
        outcome: _Outcome = ray.get(reference)
    except ray.exceptions.RayTaskError:
        raise  # a bug
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[0]
        raise RunStopped(
            f"shard {shard} ended {_NODE_FAILURES + 1} processes that were making it ({type(error).__name__}: {reason}); "
            f"{RESUMES}"
        ) from error
    if outcome.stopped is not None:
        raise outcome.stopped
    return outcome


class _Fed:
    """Runs a job in a thread of this process, whose shards come one by one.

    Args:
        job: whose networks stay loaded in between.
    """

    def __init__(self, job: ShardJob) -> None:
        self.job = job
        self._tasks, self._ends = queue.SimpleQueue[ShardTask](), queue.SimpleQueue[BaseException | None]()
        self._samples = 0
        threading.Thread(target=self._run, daemon=True).start()

    def make(self, task: ShardTask) -> int:
        """Makes a shard; returns the number of samples read."""
        self._samples = 0
        self._tasks.put(task)
        error = self._ends.get()
        if error is not None:
            raise error
        return self._samples

    def _run(self) -> None:
        try:
            self.job.work(0, self._coming(), self._count)
        except BaseException as error:  # raised by `make`
            self._ends.put(error)

    def _coming(self) -> Iterator[ShardTask]:
        while True:
            yield self._tasks.get()
            self._ends.put(None)

    def _count(self, content: Any) -> None:
        self._samples += content


_fed: tuple[str, Claims, _Fed] | None = None
"""Of the last job of this process of Ray."""


def _make(key: str, shared: Sequence[Any], shard: int, folder: str) -> _Outcome:
    """The task: makes one shard.

    Args:
        key: of the job.
        shared: reference to it, in a list so that it is fetched only by a process that has not got it yet.
        shard: its number.
        folder: working folder of the command, for relative paths.
    """
    global _fed
    import ray

    try:
        if _fed is None or _fed[0] != key:
            os.chdir(folder)
            job: ShardJob = ray.get(shared[0])
            _fed = key, Claims(job.folder), _Fed(job)
        _, claims, fed = _fed
        task = try_task(claims, shard, fed.job.is_complete)
        if not isinstance(task, ShardTask):
            return _Outcome(_BUSY if task is None else _ELSEWHERE)
        with task.claim:
            samples = fed.make(task)
        return _Outcome(_BUSY if task.claim.lost else _MADE, samples)
    except FileNotFoundError as error:
        if error.filename != folder:
            raise
        stopped: RunStopped = UserError(
            f"'{folder}' does not exist on the node {os.uname().nodename}; a Ray cluster needs a disk that all its nodes share."
        )
    except RunStopped as error:
        stopped = error
    _fed = None  # the job's thread has ended
    return _Outcome(_MADE, stopped=stopped)
