"""Drills of one run each, on this machine: what is done to it, what must come of it, and what came."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from tests.drills.runs import CannotRun, Outcome, Runs, free_port, runs_in_group, wait_until
from tests.helpers.tiny_run import tiny_config, write_config

ENDLESS = 100_000
SHARDED = {"class_path": "sdxs_lightning.training.sharding.ShardedNetworks"}


def signal_to_the_group(runs: Runs, name: str) -> Outcome:
    """SLURM, Kubernetes and terminals signal every process of a run, reading workers included."""
    config = tiny_config(runs.work, max_student_updates=ENDLESS)
    config["data"]["init_args"]["num_workers"] = 2
    run = runs.start(config)
    runs.wait_for_checkpoint(run)
    before = runs.checkpoints()
    os.killpg(run.pid, signal.Signals[name])
    code = runs.code(run)
    return Outcome(
        f"exit {128 + signal.Signals[name]}, a new checkpoint",
        f"exit {code}, {'a' if set(runs.checkpoints()) - set(before) else 'no'} new checkpoint",
        runs.said(),
    )


def one_command_for_two_ranks(runs: Runs) -> Outcome:
    """The command as a user starts it, which starts its other rank itself; SIGTERM comes to one of the two."""
    config = tiny_config(runs.work, max_student_updates=ENDLESS)
    config["trainer"] |= {"devices": 2, "strategy": "ddp"}
    _insert(config, "RaiseSignal", name="SIGTERM", batch=2, rank=1)
    run = runs.start(config)
    code, said = runs.code(run), runs.said()
    left = not wait_until(lambda: not runs_in_group(run.pid), 30)
    return Outcome(
        "exit 143, told once, update 10, no process left",
        f"exit {code}, told {'once' if said.count('stopped: ') == 1 else 'not once'}, update {runs.updates()}, "
        f"{'a' if left else 'no'} process left",
        said,
    )


def two_runs_in_one_folder(runs: Runs) -> Outcome:
    """A job array, or a job that was submitted twice."""
    first = runs.start(tiny_config(runs.work, max_student_updates=ENDLESS))
    runs.wait_for_checkpoint(first)
    config = tiny_config(runs.work)
    config["trainer"]["callbacks"][1]["init_args"]["start_over"] = True
    code = runs.code(runs.start(config, name="second"))
    first.terminate()
    said = runs.said("second")
    refused = "refused" if "is in use by another run" in said else "not refused"
    return Outcome(
        "second: exit 2, refused; first: exit 143",
        f"second: exit {code}, {refused}; first: exit {runs.code(first)}",
        said,
    )


def restart_after_kill_9(runs: Runs) -> Outcome:
    """A lock of a process that was killed is stale; the same command goes on."""
    config = tiny_config(runs.work, max_student_updates=ENDLESS)
    first = runs.start(config)
    runs.wait_for_checkpoint(first)
    first.kill()
    first.wait()
    config["model"]["init_args"]["update_schedule"]["max_student_updates"] = runs.updates() + 2
    code = runs.code(runs.start(config))
    resumed = "resumed" if "resume: " in runs.said() else "begun anew"
    return Outcome("exit 0, resumed", f"exit {code}, {resumed}", runs.said())


def lost_rank(runs: Runs, name: str) -> Outcome:
    """SIGKILL (a host without memory) or SIGSTOP (a host that hangs) of one of two ranks."""
    config = tiny_config(runs.work, max_student_updates=ENDLESS)
    config["trainer"] |= {"devices": 2, "strategy": "ddp"}
    # Not less: a busy machine may keep a rank's thread waiting for seconds.
    config["trainer"]["callbacks"][-1]["init_args"] = {"rank_timeout_seconds": 15}
    ranks = runs.start_ranks(config)
    runs.wait_for_checkpoint(ranks[0])
    ranks[1].send_signal(signal.Signals[name])
    code, said = runs.code(ranks[0]), runs.said("rank0")
    named = "rank 1 (host" in said and "Traceback" not in said
    return Outcome(
        "exit 5, rank and host named", f"exit {code}, rank and host {'' if named else 'not '}named", said
    )


def unshared_disks(runs: Runs) -> Outcome:
    """The run's folder lies on a disk of its own on each node: rank 1 sees an empty file system in its place."""
    (runs.work / "run").mkdir()
    hidden = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs none "{runs.work}/run" && exec "$@"', "sh"]
    if not shutil.which("unshare") or subprocess.run([*hidden, "true"], capture_output=True).returncode:
        raise CannotRun("mounts need root, and a container that allows them")
    config = tiny_config(runs.work)
    config["trainer"] |= {"devices": 2, "strategy": SHARDED}
    codes = [runs.code(rank) for rank in runs.start_ranks(config, wrappers=[[], hidden])]
    said = runs.said("rank0")
    named = "is another disk on rank 1" in said  # all ranks agreed to stop, and rank 0 carries the code
    return Outcome(
        "exit 2 and 0, said", f"exit {codes[0]} and {codes[1]}, {'' if named else 'not '}said", said
    )


class Node(NamedTuple):
    """A machine, or what stands for one."""

    enter: list[str]
    """Words before a command that run it there."""
    address: str
    interface: str


@contextmanager
def two_nodes() -> Iterator[list[Node]]:
    """Two network namespaces joined by a veth pair; none where the system does not allow them."""
    names = [f"sdxs{os.getpid()}{letter}" for letter in "ab"]
    steps = [f"ip netns add {name}" for name in names]
    steps.append(f"ip link add v0 netns {names[0]} type veth peer name v0 netns {names[1]}")
    for number, name in enumerate(names):
        steps.append(f"ip -n {name} addr add 10.99.7.{number + 1}/24 dev v0")
        steps += [f"ip -n {name} link set {device} up" for device in ("lo", "v0")]
    nodes = [
        Node(["ip", "netns", "exec", name], f"10.99.7.{number + 1}", "v0")
        for number, name in enumerate(names)
    ]
    # One waits for the other's connection: addresses alone do not mean that packets pass.
    listen = (
        "import socket; server = socket.create_server(('', 9000)); server.settimeout(20); server.accept()"
    )
    call = "import socket, time; time.sleep(2); socket.create_connection(('10.99.7.1', 9000), 10)"
    try:
        for step in steps:
            subprocess.run(step.split(), check=True, capture_output=True)
        ends = [
            subprocess.Popen([*node.enter, sys.executable, "-c", end], stderr=subprocess.DEVNULL)
            for node, end in zip(nodes, (listen, call), strict=True)
        ]
        made = sum(end.wait() for end in ends) == 0
    except (OSError, subprocess.CalledProcessError):
        made = False
    try:
        yield nodes if made else []
    finally:
        for name in names:
            with suppress(OSError):
                subprocess.run(["ip", "netns", "del", name], capture_output=True)


def torchrun_restart(runs: Runs) -> Outcome:
    """torchrun --max-restarts 2 on two nodes; one rank is killed once. The same command with --ckpt_path auto goes on."""
    wanted = "killed, resumed, exit 0 and 0, update 20"
    config = tiny_config(runs.work, max_student_updates=20)
    config["trainer"] |= {"devices": 1, "num_nodes": 2, "strategy": SHARDED}
    config["trainer"]["callbacks"][1]["init_args"]["every_n_student_updates"] = 5
    _insert(config, "KillOnce", batch=9, rank=1, mark=str(runs.work / "killed"))
    file, port = write_config(runs.work / "tiny.yaml", config), free_port()
    with two_nodes() as nodes:
        if not nodes:
            raise CannotRun("network namespaces need root, iproute2, and a system that allows them")
        agents = []
        for number, node in enumerate(nodes):
            torchrun = [*node.enter, sys.executable, "-m", "torch.distributed.run"]
            torchrun += ["--nnodes=2", "--nproc-per-node=1", "--max-restarts=2", "--rdzv-backend=c10d"]
            torchrun += [f"--rdzv-endpoint={nodes[0].address}:{port}", f"--local-addr={node.address}"]
            torchrun += [f"--rdzv-conf=is_host={int(number == 0)}", "train.py", "--trust=tests"]
            torchrun += ["--config", str(file), "--ckpt_path", "auto"]
            agents.append(runs.popen(torchrun, f"rank{number}", {"GLOO_SOCKET_IFNAME": node.interface}))
        codes = [runs.code(agent) for agent in agents]
    killed = (runs.work / "killed").exists()
    resumed = "Restored all states" in (runs.work / "rank0.txt").read_text()
    return Outcome(
        wanted,
        f"{'' if killed else 'not '}killed, {'' if resumed else 'not '}resumed, exit {codes[0]} and {codes[1]}, update "
        f"{runs.updates()}",
        runs.said("rank0") + runs.said("rank1"),
    )


def pods_of_a_job(runs: Runs) -> Outcome:
    """Two machines as configs/kubernetes/job.yml starts them, told apart by NODE_RANK; one is evicted, both are made anew."""
    config = tiny_config(runs.work, max_student_updates=ENDLESS)
    config["trainer"] |= {"devices": 1, "num_nodes": 2, "strategy": SHARDED}
    codes: list[int | str] = []
    for attempt in range(2):
        file = write_config(runs.work / "tiny.yaml", config)
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        command = [sys.executable, "train.py", "--trust=tests", f"--config={file}", "--ckpt_path=auto"]
        pods = [
            runs.popen(command, f"pod{node}-{attempt}", place | {"NODE_RANK": str(node)}) for node in range(2)
        ]
        if attempt == 0:
            runs.wait_for_checkpoint(pods[0])
            pods[1].terminate()
        codes += [runs.code(pod) for pod in pods]
        config["model"]["init_args"]["update_schedule"]["max_student_updates"] = runs.updates() + 2
    resumed = "Restored all states" in (runs.work / "pod0-1.txt").read_text()
    return Outcome(
        "exit 143 and 143, then 0 and 0, resumed",
        f"exit {codes[0]} and {codes[1]}, then {codes[2]} and {codes[3]}, {'' if resumed else 'not '}resumed",
        runs.said("pod0-0") + runs.said("pod0-1"),
    )


def _insert(config: dict[str, Any], fault: str, **arguments: Any) -> None:
    config["trainer"]["callbacks"].insert(
        0, {"class_path": f"tests.helpers.faults.{fault}", "init_args": arguments}
    )


DRILLS: dict[str, Callable[[Runs], Outcome]] = {
    "SIGTERM to all processes, 2 reading workers": lambda runs: signal_to_the_group(runs, "SIGTERM"),
    "SIGUSR1 to all processes, 2 reading workers": lambda runs: signal_to_the_group(runs, "SIGUSR1"),
    "SIGINT to all processes, 2 reading workers": lambda runs: signal_to_the_group(runs, "SIGINT"),
    "one command for two ranks, SIGTERM to one": one_command_for_two_ranks,
    "two runs at once in one folder": two_runs_in_one_folder,
    "kill -9, then the same command": restart_after_kill_9,
    "kill -9 of one of two ranks": lambda runs: lost_rank(runs, "SIGKILL"),
    "SIGSTOP of one of two ranks": lambda runs: lost_rank(runs, "SIGSTOP"),
    "run's folder on unshared disks, FSDP2": unshared_disks,
    "torchrun --max-restarts in two network namespaces, kill -9 of one rank, FSDP2": torchrun_restart,
    "two pods of a Kubernetes Job, SIGTERM to one, both made anew, FSDP2": pods_of_a_job,
}
