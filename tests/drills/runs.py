"""The runs of a drill: started as a user or a launcher starts them, and ended with it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from sdxs_lightning.callbacks import checkpoint_folder as folders
from tests.helpers.tiny_run import ROOT, write_config

PATIENCE = 600.0
"""Seconds for what takes a few on an idle machine: no outcome depends on a machine's speed."""
LEFT_OUT = "left out"
"""Begins what came of a drill that this machine cannot run."""
FAILED = "**FAILED**"


class CannotRun(Exception):
    """This machine cannot run a drill, for this reason."""


class Outcome(NamedTuple):
    """Of one drill."""

    wanted: str
    got: str
    said: str
    """The end of what the run wrote."""


def verdict(outcome: Outcome) -> str:
    """Last column of the table."""
    if outcome.got.startswith(LEFT_OUT):
        return LEFT_OUT
    return "passed" if outcome.wanted == outcome.got else FAILED


class Runs:
    """The processes of one drill, each in a group of its own, and their folder. A context that kills what is left of them.

    Args:
        work: folder of the drill; the run's is `work/run`.
    """

    def __init__(self, work: Path) -> None:
        self.work = work
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Runs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            process.wait()

    def start(self, config: dict[str, Any], name: str = "run") -> subprocess.Popen[bytes]:
        """Starts train.py with `--ckpt_path auto`; a run of another name without it."""
        file = write_config(self.work / f"{name}.yaml", config)
        command = [sys.executable, "train.py", "--trust=tests", "--config", str(file)]
        return self.popen([*command, "--ckpt_path", "auto"] if name == "run" else command, name)

    def start_ranks(
        self, config: dict[str, Any], wrappers: Sequence[Sequence[str]] = ((), ())
    ) -> list[subprocess.Popen[bytes]]:
        """Starts a process per rank, as a cluster's launcher does; each behind the words of its wrapper."""
        file, port = write_config(self.work / "tiny.yaml", config), free_port()
        ranks = []
        for rank, wrapper in enumerate(wrappers):
            place = {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(len(wrappers))}
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            command = [*wrapper, sys.executable, "train.py", "--trust=tests", "--config", str(file)]
            ranks.append(self.popen(command, f"rank{rank}", place))
        return ranks

    def popen(
        self, command: Sequence[str], name: str, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Starts a command whose output goes to `work/NAME.txt`."""
        fixed = {
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "GLOO_SOCKET_IFNAME": "lo",
            "PYTHONPATH": str(ROOT),
        }
        with (self.work / f"{name}.txt").open("w") as output:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | fixed | dict(environment or {}),
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._processes.append(process)
        return process

    def code(self, process: subprocess.Popen[bytes]) -> int | str:
        """The exit code of a process, waited for."""
        try:
            return process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            return f"none in {PATIENCE:.0f} s"

    def wait_for_checkpoint(self, run: subprocess.Popen[bytes]) -> None:
        """Waits for the run's first checkpoint, or its end."""
        wait_until(lambda: run.poll() is not None or bool(self.checkpoints()))

    def checkpoints(self) -> list[str]:
        """Names of the complete checkpoints."""
        return [path.name for path in folders.complete_checkpoints(self.work / "run" / "checkpoints")]

    def updates(self) -> int:
        """Student updates of the newest complete checkpoint."""
        newest = folders.newest_complete_checkpoint(self.work / "run" / "checkpoints")
        manifest = folders.read_manifest(newest) if newest is not None else None
        return manifest.student_updates if manifest is not None else 0

    def said(self, name: str = "run") -> str:
        """The end of what a process wrote."""
        return (self.work / f"{name}.txt").read_text()[-1500:]


def wait_until(reached: Callable[[], bool], seconds: float = PATIENCE) -> bool:
    """Waits for a condition; whether it was reached."""
    end = time.monotonic() + seconds
    while not reached():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


def runs_in_group(group: int) -> bool:
    """Whether a process of a group is still running; one that has ended and that nobody has waited for is not."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, of_group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(of_group) == group and state not in "ZX":
                return True
    return False


def free_port() -> int:
    """A port of the loopback that nothing uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
