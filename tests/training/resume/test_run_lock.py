"""One run per folder, by as many processes as its configuration has."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from sdxs_lightning.callbacks import run_folder
from sdxs_lightning.callbacks.run_folder import LOCK, RunLock
from tests.helpers.resumed_run import refused_beside_logs


def test_two_runs_in_one_folder_are_refused(resume: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    """The lock of a living process of this host: the one that started this test."""
    lock = tmp_path / "run" / LOCK
    assert not lock.exists()  # given back by the run that made the checkpoints
    owner = run_folder._this_process() | {
        "pid": os.getppid(),
        "started_at": run_folder._started_at(os.getppid()),
    }
    lock.write_text(json.dumps(owner))
    code, said = resume()
    assert code == 2
    assert f"is in use by another run (process {os.getppid()} on host {owner['host']}" in said
    assert lock.exists()
    assert refused_beside_logs(resume, tmp_path) and lock.exists()
    lock.write_text(json.dumps(owner | {"started_at": "1"}))  # the number was given to another process since
    code, said = resume()
    assert code == 0
    assert "is stale and was removed" in said
    assert not lock.exists()


def test_a_lock_of_another_host_is_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(run_folder, "WATCH_SECONDS", 0.6)
    alive = RunLock(tmp_path)
    assert alive.acquire() is None
    own = run_folder._this_process()
    monkeypatch.setattr(run_folder, "_this_process", lambda: own | {"host": "elsewhere"})
    problem = RunLock(tmp_path).acquire()
    assert problem is not None and f"process {os.getpid()} on host {own['host']}" in problem
    alive._released.set()  # killed: the file stays, and nobody touches it
    os.utime(tmp_path / LOCK, (2e9, 2e9))  # a clock that is ahead by years
    second = RunLock(tmp_path)
    assert second.acquire() is None
    alive.release()
    assert (tmp_path / LOCK).exists()  # it is not the first one's any more
    # An earlier start of the same SLURM job, on another node, is over.
    monkeypatch.setattr(
        run_folder, "_this_process", lambda: own | {"host": "third", "job": "7", "restart": "1"}
    )
    (tmp_path / LOCK).write_text(json.dumps(own | {"job": "7", "restart": "0"}))
    third = RunLock(tmp_path)
    assert third.acquire() is None
    second.release()
    third.release()
    assert not (tmp_path / LOCK).exists()


def test_a_lock_of_another_container_of_this_host_is_watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Containers may share the host's name and not its process ids: this process does not exist in the other one."""
    monkeypatch.setattr(run_folder, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(run_folder, "WATCH_SECONDS", 0.6)
    alive = RunLock(tmp_path)
    assert alive.acquire() is None
    own = run_folder._this_process()
    monkeypatch.setattr(run_folder, "_this_process", lambda: own | {"namespace": "pid:[1]", "pid": 1})
    monkeypatch.setattr(run_folder, "_started_at", lambda pid: None)
    problem = RunLock(tmp_path).acquire()
    assert problem is not None and f"process {os.getpid()}" in problem
    alive.release()


def test_a_lock_that_was_replaced_meanwhile_is_not_removed(tmp_path: Path) -> None:
    """Two starts find the same stale lock: the first replaces it, the second must not remove the first one's."""
    stale = {"host": "gone", "pid": 3}
    (tmp_path / LOCK).write_text(json.dumps({"host": "first", "pid": 7}))
    RunLock(tmp_path)._remove(stale)
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]
    assert json.loads((tmp_path / LOCK).read_text()) == {"host": "first", "pid": 7}
    (tmp_path / LOCK).write_text(json.dumps(stale))
    RunLock(tmp_path)._remove(stale)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_JOB_NAME": "x", "SLURM_JOB_ID": "1"}
            | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"},
            "the launcher started 2 processes, but trainer.num_nodes 1 x trainer.devices 1 are 1; start one process per device "
            "(sbatch --ntasks-per-node, torchrun --nproc-per-node), or change trainer.num_nodes and trainer.devices.",
        ),
        (
            {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
            | {"TORCHELASTIC_RUN_ID": "x", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
            "the launcher started 2 processes, but trainer.num_nodes 1 x trainer.devices 1 are 1; ",
        ),
    ],
    ids=["SLURM", "torchrun"],
)
def test_the_launcher_started_as_many_processes_as_the_configuration_has(
    resume: Callable[..., tuple[int, str]],
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    message: str,
) -> None:
    """Else each of them would train by itself, in one folder."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    code, said = resume()
    assert (code, message in said) == (2, True)
