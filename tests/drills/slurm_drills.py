"""Drills of the job script by a real SLURM of two nodes on this machine; as root, on Debian 12."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.drills.runs import CannotRun, Outcome, Runs, wait_until
from tests.helpers.tiny_run import ROOT, tiny_config, write_config

HERE = Path(__file__).parent / "slurm"
SCRIPT = ROOT / "configs" / "slurm" / "train.sbatch"
PACKAGES = "slurm-wlm slurmctld slurmd slurm-client munge slurm-wlm-basic-plugins"
NOT_HERE = f"as root, apt-get install --no-install-recommends {PACKAGES}"


def _available() -> bool:
    return os.geteuid() == 0 and all(shutil.which(name) for name in ("slurmctld", "slurmd", "munged"))


@contextmanager
def slurm(folder: Path, **settings: str) -> Iterator[dict[str, str]]:
    """Starts it; the environment that its commands need."""
    environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), **settings}
    folder.parent.chmod(0o711)  # munge's daemon runs as a user of its own
    try:
        try:
            started = subprocess.run(
                [HERE / "start_slurm.sh", folder], capture_output=True, env=environment, timeout=180
            )
        except subprocess.TimeoutExpired as error:
            raise CannotRun("SLURM does not start here in three minutes") from error
        if started.returncode:
            reason = started.stderr.decode().strip() or "it says nothing"
            raise CannotRun(f"SLURM does not start here: {reason.splitlines()[-1]}")
        yield environment
    finally:
        subprocess.run([HERE / "stop_slurm.sh", folder], env=environment)


def _output(command: list[str], environment: dict[str, str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.strip()


def job_script(runs: Runs) -> Outcome:
    """Seven drills of the job script, with a stand-in for train.py."""
    wanted = "7 of 7 ok"
    if not _available():
        raise CannotRun(NOT_HERE)
    with slurm(runs.work / "slurm") as environment:
        command = [str(HERE / "drills.sh"), str(SCRIPT), str(runs.work / "jobs")]
        said = subprocess.run(command, capture_output=True, text=True, env=environment).stdout
    passed = sum(line.startswith("ok") for line in said.splitlines())
    return Outcome(wanted, f"{passed} of 7 ok", said)


def preempted(runs: Runs) -> Outcome:
    """A real run with reading workers on two nodes, pre-empted with SIGTERM to every process and 60 s of grace."""
    wanted = "saved, PENDING"
    if not _available():
        raise CannotRun(NOT_HERE)
    with slurm(runs.work / "slurm", CPUS="15") as environment:
        job = runs.work / "job.sbatch"
        job.write_text(_job(runs, environment))
        output = f"--output={runs.work}/job.txt"
        number = _output(["sbatch", "--parsable", output, f"--chdir={ROOT}", str(job)], environment)
        wait_until(lambda: bool(runs.checkpoints()))
        before = set(runs.checkpoints())
        pushing = "sbatch -phigh -N2 --ntasks-per-node=1 --cpus-per-task=12 --output=/dev/null --wrap"
        _output([*pushing.split(), "srun sleep 3"], environment)

        def state() -> str:
            return _output(["squeue", "-h", f"-j{number}", "-o%T"], environment)

        wait_until(lambda: state() in ("PENDING", ""), 120)
        saved, found = bool(before) and bool(set(runs.checkpoints()) - before), state()
        subprocess.run(["scancel", number], env=environment)
    return Outcome(wanted, f"{'' if saved else 'not '}saved, {found}", runs.said("job"))


def _job(runs: Runs, environment: dict[str, str]) -> str:
    """The shipped job script with a tiny run on the CPU in place of the real one."""
    config = tiny_config(runs.work, max_student_updates=100_000)
    config["data"]["init_args"]["num_workers"] = 1
    file = write_config(runs.work / "tiny.yaml", config)
    on_cpu = {
        "trainer": {"accelerator": "cpu", "precision": "32-true"},
        "model": {"init_args": {"real_score_dtype": "float32"}},
    }
    cpu = write_config(runs.work / "cpu.yaml", on_cpu)
    python = f"env MASTER_ADDR=127.0.0.1 GLOO_SOCKET_IFNAME=lo OMP_NUM_THREADS=1 {sys.executable} train.py"
    made = _output([str(HERE / "make_job.sh"), str(SCRIPT), str(runs.work / "run"), python], environment)
    overlay = "--config configs/hardware/multi_node.yaml"
    return made.replace("CONFIG=configs/sd15/distill.yaml", f"CONFIG={file}").replace(
        overlay, f"{overlay} --config {cpu}"
    )


SLURM_DRILLS: dict[str, Callable[[Runs], Outcome]] = {
    "job script: seven drills by SLURM": job_script,
    "SLURM pre-emption of a real run with reading workers, FSDP2": preempted,
}
