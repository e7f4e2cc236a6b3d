"""Drills of one run each, on this machine: what is done to it, what must come of it, and what came."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sdxs_lightning.callbacks import checkpoint_folder as folders
from tests.helpers.tiny_run import ROOT, tiny_config, write_config


class Outcome(NamedTuple):
    """Of one drill."""

    wanted: str
    got: str
    said: str
    """The end of what the run wrote."""


def signal_to_the_group(work: Path, name: str) -> Outcome:
    """SLURM, Kubernetes and terminals signal every process of a run, reading workers included."""
    config = _config(work, max_student_updates=100_000)
    config["data"]["init_args"]["num_workers"] = 2
    run = _start(work, config)
    _wait_for_checkpoint(work, run)
    before = _checkpoints(work)
    os.killpg(run.pid, signal.Signals[name])
    code = run.wait(120)
    return Outcome(
        f"exit {128 + signal.Signals[name]}, a new checkpoint",
        f"exit {code}, {'a' if set(_checkpoints(work)) - set(before) else 'no'} new checkpoint",
        _said(work),
    )


def one_command_for_two_ranks(work: Path) -> Outcome:
    """The command as a user starts it, which starts its other rank itself; SIGTERM comes to one of the two."""
    config = _config(work, max_student_updates=100_000)
    config["trainer"] |= {"devices": 2, "strategy": "ddp"}
    config["trainer"]["callbacks"].insert(
        0,
        {
            "class_path": "tests.helpers.faults.RaiseSignal",
            "init_args": {"name": "SIGTERM", "batch": 2, "rank": 1},
        },
    )
    run = _start(work, config)
    code = run.wait(240)
    said = _said(work)
    # Nobody is left in the process group.
    left = subprocess.run(["pgrep", "--pgroup", str(run.pid)], capture_output=True, text=True).stdout.split()
    return Outcome(
        "exit 143, told once, update 10, no process left",
        f"exit {code}, told {'once' if said.count('stopped: ') == 1 else 'not once'}, update {_updates(work)}, "
        f"{'a' if left else 'no'} process left",
        said,
    )


def two_runs_in_one_folder(work: Path) -> Outcome:
    """A job array, or a job that was submitted twice."""
    first = _start(work, _config(work, max_student_updates=100_000))
    _wait_for_checkpoint(work, first)
    config = _config(work)
    config["trainer"]["callbacks"][1]["init_args"]["start_over"] = True
    second = _start(work, config, name="second")
    code = second.wait(120)
    first.terminate()
    said = _said(work, "second")
    refused = "refused" if "is in use by another run" in said else "not refused"
    return Outcome(
        "second: exit 2, refused; first: exit 143",
        f"second: exit {code}, {refused}; first: exit {first.wait(120)}",
        said,
    )


def restart_after_kill_9(work: Path) -> Outcome:
    """A lock of a process that was killed is stale; the same command goes on."""
    config = _config(work, max_student_updates=100_000)
    first = _start(work, config)
    _wait_for_checkpoint(work, first)
    first.kill()
    first.wait(60)
    config["model"]["init_args"]["update_schedule"]["max_student_updates"] = _updates(work) + 2
    code = _start(work, config).wait(120)
    return Outcome(
        "exit 0, resumed",
        f"exit {code}, {'resumed' if 'resume: ' in _said(work) else 'begun anew'}",
        _said(work),
    )


def lost_rank(work: Path, name: str) -> Outcome:
    """SIGKILL (a host without memory) or SIGSTOP (a host that hangs) of one of two ranks."""
    config = _config(work, max_student_updates=100_000)
    config["trainer"] |= {"devices": 2, "strategy": "ddp"}
    config["trainer"]["callbacks"][-1]["init_args"] = {"rank_timeout_seconds": 6}
    ranks = _start_ranks(work, config)
    _wait_for_checkpoint(work, ranks[0])
    ranks[1].send_signal(signal.Signals[name])
    start = time.monotonic()
    code = ranks[0].wait(120)
    seconds = time.monotonic() - start
    ranks[1].kill()
    said = _said(work, "rank0")
    named = "rank 1 (host" in said and "Traceback" not in said
    return Outcome(
        "exit 5 within 60 s, rank and host named",
        f"exit {code} {'within' if seconds < 60 else 'after'} 60 s, rank and host {'' if named else 'not '}named",
        said,
    )


def unshared_disks(work: Path) -> Outcome:
    """The run's folder lies on a disk of its own on each node: rank 1 sees an empty file system in its place."""
    config = _config(work)
    config["trainer"] |= {
        "devices": 2,
        "strategy": {"class_path": "sdxs_lightning.training.sharding.ShardedNetworks"},
    }
    (work / "run").mkdir()
    hidden = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs none "{work}/run" && exec "$@"', "sh"]
    ranks = _start_ranks(work, config, wrappers=[[], hidden])
    codes = [rank.wait(120) for rank in ranks]
    said = _said(work, "rank0")
    named = "is another disk on rank 1" in said  # all ranks agreed to stop, and rank 0 carries the code
    return Outcome(
        "exit 2 and 0, said", f"exit {codes[0]} and {codes[1]}, {'' if named else 'not '}said", said
    )


def torchrun_restart(work: Path) -> Outcome:
    """torchrun --max-restarts 2 on two nodes; one rank is killed once. The same command with --ckpt_path auto goes on."""
    config = _config(work, max_student_updates=40)
    config["trainer"] |= {
        "devices": 1,
        "num_nodes": 2,
        "strategy": {"class_path": "sdxs_lightning.training.sharding.ShardedNetworks"},
    }
    config["trainer"]["callbacks"].insert(
        0,
        {
            "class_path": "tests.helpers.faults.KillOnce",
            "init_args": {"batch": 9, "rank": 1, "mark": str(work / "killed")},
        },
    )
    file, port = write_config(work / "tiny.yaml", config), _free_port()
    agents = []
    for node in range(2):
        torchrun = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nnodes=2",
            "--nproc-per-node=1",
            "--max-restarts=2",
        ]
        torchrun += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--local-addr=127.0.0.1"]
        torchrun += [
            f"--rdzv-conf=is_host={int(node == 0)}",
            "train.py",
            "--trust=tests",
            "--config",
            str(file),
            "--ckpt_path",
            "auto",
        ]
        agents.append(_popen(torchrun, work, f"rank{node}"))
    codes = []
    for agent in agents:
        try:
            codes.append(agent.wait(400))
        except subprocess.TimeoutExpired:
            os.killpg(agent.pid, signal.SIGKILL)
            codes.append(-9)
    said = _said(work, "rank0") + _said(work, "rank1")
    killed, resumed = (work / "killed").exists(), "Restored all states" in (work / "rank0.txt").read_text()
    return Outcome(
        "killed, resumed, exit 0 and 0, update 40",
        f"{'' if killed else 'not '}killed, {'' if resumed else 'not '}resumed, exit {codes[0]} and {codes[1]}, update "
        f"{_updates(work)}",
        said,
    )


def job_script(work: Path) -> Outcome:
    """Seven drills of configs/slurm/train.sbatch by a real SLURM, with a stand-in for train.py; as root on Debian 12."""
    here, conf = Path(__file__).parent / "slurm", work / "slurm" / "slurm.conf"
    if shutil.which("slurmctld") is None:
        return Outcome("7 of 7 ok", "not run: apt-get install slurm-wlm", "")
    environment = os.environ | {"SLURM_CONF": str(conf)}
    subprocess.run(
        [here / "start_slurm.sh", work / "slurm"], check=True, capture_output=True, env=environment
    )
    try:
        script = ROOT / "configs" / "slurm" / "train.sbatch"
        drills = subprocess.run(
            [here / "drills.sh", script, work / "jobs"], capture_output=True, text=True, env=environment
        )
    finally:
        subprocess.run([here / "stop_slurm.sh", work / "slurm"], env=environment)
    passed = sum(line.startswith("ok") for line in drills.stdout.splitlines())
    return Outcome("7 of 7 ok", f"{passed} of 7 ok", drills.stdout)


def preempted_by_slurm(work: Path) -> Outcome:
    """A real run with reading workers on two SLURM nodes, pre-empted with SIGTERM to every process and 60 s of grace."""
    here, conf = Path(__file__).parent / "slurm", work / "slurm" / "slurm.conf"
    if shutil.which("slurmctld") is None:
        return Outcome("saved, PENDING", "not run: apt-get install slurm-wlm", "")
    config = _config(work, max_student_updates=100_000)
    config["data"]["init_args"]["num_workers"] = 1
    file = write_config(work / "tiny.yaml", config)
    on_cpu = {
        "trainer": {"accelerator": "cpu", "precision": "32-true"},
        "model": {"init_args": {"real_score_dtype": "float32"}},
    }
    cpu = write_config(work / "cpu.yaml", on_cpu)
    python = f"env MASTER_ADDR=127.0.0.1 GLOO_SOCKET_IFNAME=lo OMP_NUM_THREADS=1 {sys.executable} train.py"
    environment = os.environ | {"SLURM_CONF": str(conf), "CPUS": "15"}
    subprocess.run(
        [here / "start_slurm.sh", work / "slurm"], check=True, capture_output=True, env=environment
    )
    try:
        made = subprocess.run(
            [here / "make_job.sh", ROOT / "configs" / "slurm" / "train.sbatch", work / "run", python],
            check=True,
            capture_output=True,
            text=True,
            env=environment,
        ).stdout
        overlay = "--config configs/hardware/multi_node.yaml"
        job = made.replace("CONFIG=configs/sd15/distill.yaml", f"CONFIG={file}").replace(
            overlay, f"{overlay} --config {cpu}"
        )
        (work / "job.sbatch").write_text(job)
        submit = [
            "sbatch",
            "--parsable",
            f"--output={work}/job.txt",
            f"--chdir={ROOT}",
            str(work / "job.sbatch"),
        ]
        number = subprocess.run(
            submit, check=True, capture_output=True, text=True, env=environment
        ).stdout.strip()
        end = time.monotonic() + 180
        while not _checkpoints(work) and time.monotonic() < end:
            time.sleep(0.5)
        before = set(_checkpoints(work))
        pushing = [
            "sbatch",
            "-phigh",
            "-N2",
            "--ntasks-per-node=1",
            "--cpus-per-task=12",
            "--output=/dev/null",
            "--wrap",
        ]
        subprocess.run([*pushing, "srun sleep 3"], check=True, capture_output=True, env=environment)
        time.sleep(40)
        state = subprocess.run(
            ["squeue", "-h", f"-j{number}", "-o%T"], capture_output=True, text=True, env=environment
        ).stdout.strip()
        saved = bool(before) and bool(set(_checkpoints(work)) - before)
        subprocess.run(["scancel", number], env=environment)
    finally:
        subprocess.run([here / "stop_slurm.sh", work / "slurm"], env=environment)
    return Outcome("saved, PENDING", f"{'' if saved else 'not '}saved, {state}", _said(work, "job"))


DRILLS: dict[str, Callable[[Path], Outcome]] = {
    "SIGTERM to all processes, 2 reading workers": lambda work: signal_to_the_group(work, "SIGTERM"),
    "SIGUSR1 to all processes, 2 reading workers": lambda work: signal_to_the_group(work, "SIGUSR1"),
    "SIGINT to all processes, 2 reading workers": lambda work: signal_to_the_group(work, "SIGINT"),
    "one command for two ranks, SIGTERM to one": one_command_for_two_ranks,
    "two runs at once in one folder": two_runs_in_one_folder,
    "kill -9, then the same command": restart_after_kill_9,
    "kill -9 of one of two ranks": lambda work: lost_rank(work, "SIGKILL"),
    "SIGSTOP of one of two ranks": lambda work: lost_rank(work, "SIGSTOP"),
    "run's folder on unshared disks, FSDP2": unshared_disks,
    "torchrun --max-restarts, two agents, kill -9 of one rank, FSDP2": torchrun_restart,
    "job script: seven drills by SLURM": job_script,
    "SLURM pre-emption of a real run with reading workers, FSDP2": preempted_by_slurm,
}


def _config(work: Path, **schedule: int) -> dict[str, Any]:
    return tiny_config(work, **schedule)


def _start(work: Path, config: dict[str, Any], name: str = "run") -> subprocess.Popen[bytes]:
    file = write_config(work / f"{name}.yaml", config)
    command = [sys.executable, "train.py", "--trust=tests", "--config", str(file)]
    if name == "run":
        command += ["--ckpt_path", "auto"]
    return _popen(command, work, name)


def _start_ranks(
    work: Path, config: dict[str, Any], wrappers: Sequence[Sequence[str]] = ((), ())
) -> list[subprocess.Popen[bytes]]:
    file, port = write_config(work / "tiny.yaml", config), _free_port()
    ranks = []
    for rank, wrapper in enumerate(wrappers):
        place = {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(len(wrappers))}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [*wrapper, sys.executable, "train.py", "--trust=tests", "--config", str(file)]
        ranks.append(_popen(command, work, f"rank{rank}", place))
    return ranks


def _popen(
    command: Sequence[str], work: Path, name: str, environment: dict[str, str] | None = None
) -> subprocess.Popen[bytes]:
    fixed = {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": str(ROOT),
    }
    with (work / f"{name}.txt").open("w") as output:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | fixed | (environment or {}),
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def _wait_for_checkpoint(work: Path, run: subprocess.Popen[bytes], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while run.poll() is None and not _checkpoints(work) and time.monotonic() < end:
        time.sleep(0.1)


def _checkpoints(work: Path) -> list[str]:
    return [path.name for path in folders.complete_checkpoints(work / "run" / "checkpoints")]


def _updates(work: Path) -> int:
    newest = folders.newest_complete_checkpoint(work / "run" / "checkpoints")
    manifest = folders.read_manifest(newest) if newest is not None else None
    return manifest.student_updates if manifest is not None else 0


def _said(work: Path, name: str = "run") -> str:
    return (work / f"{name}.txt").read_text()[-1500:]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
