"""Checks on a run's folder: used by one run at a time, and shared by all ranks."""

from __future__ import annotations

import atexit
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from sdxs_lightning.callbacks.ranks import Ranks

LOCK = "run.lock"
ORIGIN = "origin.json"
"""Commit and library versions of the run that wrote it, beside its config.yaml; published with the model."""
STARTS = "starts.jsonl"
"""A line for each start of the run: the same, the command, and the machines; not published."""
BEAT_SECONDS = 10.0
"""Interval at which the owner touches its lock."""
WATCH_SECONDS = 35.0
"""How long another host's lock is watched before it is considered stale."""


class RunLock:
    """A lock file in the run's folder that names the owning process; taken by rank 0.

    Detects stale locks: on the same host by the process, after a restart of the same SLURM job by the restart count, and from
    another host by the file's time no longer changing, independent of clocks.

    Args:
        folder: the run's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK
        self._token: str | None = None
        self._released = threading.Event()

    def acquire(self) -> str | None:
        """Takes the lock; waits up to WATCH_SECONDS for an owner on another host to touch it.

        Returns:
            The reason why the lock is not available, or None.

        Raises:
            OSError: if the folder cannot be written.
        """
        while True:
            try:
                descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            except FileExistsError:
                owner = _read(self.path)
                if self._is_alive(owner):
                    return (
                        f"'{self.path.parent}' is in use by another run (process {owner.get('pid', '?')} on host "
                        f"{owner.get('host', '?')}{_job_of(owner)}); two runs in one folder overwrite each other. "
                        f"Give another --trainer.default_root_dir, or remove '{self.path}' if that run is over."
                    )
                sys.stderr.write(
                    f"the lock of process {owner.get('pid', '?')} on host {owner.get('host', '?')} is stale and was removed.\n"
                )
                self._remove(owner)
                continue
            self._token = uuid.uuid4().hex
            with os.fdopen(descriptor, "w") as file:
                json.dump(_this_process() | {"token": self._token}, file)
            threading.Thread(target=self._beat, daemon=True).start()
            atexit.register(self.release)
            return None

    def release(self) -> None:
        """Removes the lock if it is still this process's."""
        self._released.set()
        if self._token is not None and _read(self.path).get("token") == self._token:
            with suppress(OSError):  # the disk is read-only by now; the next run finds the lock stale
                self.path.unlink()
        self._token = None

    def _remove(self, stale: dict[str, Any]) -> None:
        """Removes a stale lock, unless another process that found it stale too has replaced it meanwhile."""
        aside = self.path.with_name(f".{LOCK}-{uuid.uuid4().hex}")
        try:
            self.path.rename(aside)
            if _read(aside) != stale:
                os.link(aside, self.path)
        except (FileNotFoundError, FileExistsError):
            pass
        aside.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._released.wait(BEAT_SECONDS):
            try:
                os.utime(self.path)
            except OSError:
                continue

    def _is_alive(self, owner: dict[str, Any]) -> bool:
        own = _this_process()
        if (
            own["job"] is not None
            and own["job"] == owner.get("job")
            and own["restart"] != owner.get("restart")
        ):
            return False  # an earlier start of the same job
        if all(own[name] == owner.get(name) for name in ("host", "boot", "namespace")):
            pid = owner.get("pid")
            return pid != own["pid"] and _started_at(pid) == owner.get("started_at") is not None
        before, end = _modified(self.path), time.monotonic() + WATCH_SECONDS
        while time.monotonic() < end:
            time.sleep(min(1.0, WATCH_SECONDS / 10))
            if _modified(self.path) != before:
                return self.path.exists()
        return False


def unshared(folder: Path, ranks: Ranks, seconds: float = 10.0) -> str | None:
    """Checks that all ranks see the same folder, by a file that rank 0 writes. A collective.

    Checkpoints whose shards are on the disks of different nodes look complete and cannot be loaded.

    Args:
        folder: exists and is writable on rank 0.
        ranks: the ranks of the run.
        seconds: how long a network file system may take to show the file.

    Returns:
        A message that names the first rank that does not see the file, or None.
    """
    if ranks.count == 1:
        return None
    host = socket.gethostname()
    token, first_host = ranks.of_first((folder / f".seen-by-all-ranks-{uuid.uuid4().hex}", host))
    if ranks.first:
        token.touch()
    ranks.wait()
    end = time.monotonic() + seconds
    while not (seen := token.exists()) and time.monotonic() < end:
        if folder.is_dir():
            os.listdir(folder)  # invalidates a network file system's cache of missing files
        time.sleep(0.2)
    problem = ranks.first_message(
        None
        if seen
        else f"'{folder}' is another disk on rank {ranks.number} (host {host}) than on rank 0 (host {first_host}), so "
        "checkpoints would be incomplete; give a folder that all nodes share as --trainer.default_root_dir."
    )
    if ranks.first:
        token.unlink(missing_ok=True)
    return problem


def origin() -> dict[str, Any]:
    """The code of a run: `commit` and `changed` (uncommitted changes) of this repository, and library `versions`.

    Commit and changes are None outside a clone, and without git.
    """
    root = Path(__file__).resolve().parents[2]
    in_clone = _git(root, "rev-parse", "--show-toplevel") == str(root)
    commit = _git(root, "rev-parse", "HEAD") if in_clone else None
    changed = None if commit is None else bool(_git(root, "status", "--porcelain", "--untracked-files=no"))
    names = ("torch", "lightning", "diffusers", "transformers", "peft")
    return {"commit": commit, "changed": changed, "versions": {name: version(name) for name in names}}


def machine(device: torch.device) -> dict[str, str]:
    """Where a rank runs: `host` and `device`, the GPU's name or "cpu"."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"host": socket.gethostname(), "device": name}


def write_start(folder: Path, machines: Sequence[Mapping[str, str]], resumed_from: str | None) -> None:
    """Writes the code and versions to ORIGIN, and adds these, the command and each rank's machine to STARTS.

    Args:
        folder: the run's.
        machines: of the ranks, in their order.
        resumed_from: the checkpoint, or None.

    Raises:
        OSError: if the folder cannot be written.
    """
    start = origin()
    (folder / ORIGIN).write_text(json.dumps(start, indent=2) + "\n")
    start["versions"] |= {"python": platform.python_version(), "cuda": torch.version.cuda}
    start |= {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "resumed_from": resumed_from,
        "job": os.environ.get("SLURM_JOB_ID"),
        "world_size": len(machines),
        "hosts": [one["host"] for one in machines],
        "devices": sorted({one["device"] for one in machines}),
    }
    with (folder / STARTS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(start) + "\n")


def last_beginning(folder: Path) -> datetime | None:
    """When a run was last started without a checkpoint, in STARTS; None if that does not say."""
    try:
        starts = [json.loads(line) for line in (folder / STARTS).read_text(encoding="utf-8").splitlines()]
        times = [datetime.fromisoformat(one["started"]) for one in starts if one["resumed_from"] is None]
    except (OSError, ValueError, TypeError, KeyError):  # of an older version, or cut off
        return None
    return max(times, default=None)


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        found = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()


def _this_process() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "boot": _text("/proc/sys/kernel/random/boot_id"),
        "namespace": _process_namespace(),
        "pid": os.getpid(),
        "started_at": _started_at(os.getpid()),
        "job": os.environ.get("SLURM_JOB_ID"),
        "restart": os.environ.get("SLURM_RESTART_COUNT", "0"),
    }


def _started_at(pid: Any) -> str | None:
    """Start time of a process on this host, which tells reused process ids apart; None if the process is gone."""
    try:
        os.kill(int(pid), 0)
    except PermissionError:
        pass
    except (OSError, ValueError, TypeError):
        return None
    stat = _text(f"/proc/{pid}/stat")
    return stat.rpartition(")")[2].split()[19] if stat else "unknown"


def _process_namespace() -> str:
    """In which process ids are counted: containers of one host may share its name, and not its processes."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _text(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _job_of(owner: dict[str, Any]) -> str:
    return f", SLURM job {owner['job']}" if owner.get("job") else ""
