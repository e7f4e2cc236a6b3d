"""Drills of `data.prepare` and `evaluate` on several nodes and on an object store: what is done to them, and what came."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.drills.runs import CannotRun, Outcome, Runs, wait_until

IMAGES, PER_SHARD = 640, 16
SHARDS = IMAGES // PER_SHARD
SOME = SHARDS // 5
"""Complete shards at which a process or a node is killed."""


def images_of(work: Path) -> Path:
    """A folder of images that take long enough to be killed within."""
    folder = work / "photos"
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(IMAGES):
        Image.fromarray(random.integers(0, 256, (96, 96, 3), dtype=np.uint8)).save(
            folder / f"{number:03d}.png"
        )
        (folder / f"{number:03d}.txt").write_text(f"photo {number}")
    return folder


def command(work: Path, out: Path | str, *more: str) -> list[str]:
    """Resizes the images, and packs them."""
    prepare = [sys.executable, "-m", "data.prepare", "images", "--from", str(work / "photos")]
    return [*prepare, "--resolution", "80", "--samples_per_shard", str(PER_SHARD), "--out", str(out), *more]


def sums_of_one_machine(runs: Runs) -> str:
    """SHA256SUMS of one command that has the set to itself."""
    images_of(runs.work)
    alone = runs.work / "alone"
    assert runs.code(runs.popen(command(runs.work, alone, "--processes", "1"), "alone")) == 0, runs.said(
        "alone"
    )
    return (alone / "SHA256SUMS").read_text()


def wait_for_shards(folder: Path, count: int) -> None:
    """Until that many are complete."""
    wait_until(lambda: len(list(folder.glob("*_stats.json"))) >= count)


def commands_at_once(runs: Runs) -> Outcome:
    """Four times the same command, as srun starts it; one is killed in the middle, and it is given once more at the end."""
    work = runs.work
    sums, out = sums_of_one_machine(runs), work / "set"
    line = command(work, out, "--processes", "1")
    commands = [runs.popen(line, f"run{number}") for number in range(4)]
    wait_for_shards(out, SOME)
    commands[0].send_signal(signal.SIGKILL)
    codes = [runs.code(one) for one in commands]
    again = runs.code(runs.popen(command(work, out), "again"))
    nothing = "0 samples read" in runs.said("again")
    same = "same" if (out / "SHA256SUMS").read_text() == sums else "other"
    left = "nothing" if not list(out.glob(".*")) else "something"
    return Outcome(
        "exit -9, 0, 0, 0; same SHA256SUMS, nothing left over; again: exit 0, nothing read",
        f"exit {', '.join(map(str, codes))}; {same} SHA256SUMS, {left} left over; again: exit {again}, "
        f"{'nothing' if nothing else 'something'} read",
        runs.said("run1"),
    )


@contextmanager
def ray_cluster() -> Iterator[tuple[str, Callable[[], None]]]:
    """A Ray cluster of three nodes with one core each on this machine: its address, and what kills a node but the head."""
    if importlib.util.find_spec("ray") is None:
        raise CannotRun("uv sync --group drills")
    # No reports to Ray's makers; no task ended because something else fills this machine's memory.
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_memory_monitor_refresh_ms": "0"}
    from ray.cluster_utils import Cluster

    def too_late(*_: object) -> None:
        raise TimeoutError("three minutes are over")

    node = {"num_cpus": 1, "object_store_memory": 80 << 20}
    previous = signal.signal(signal.SIGALRM, too_late)
    signal.alarm(180)
    try:
        cluster = Cluster(initialize_head=True, head_node_args=node | {"include_dashboard": False})
        others = [cluster.add_node(**node, include_dashboard=None) for _ in range(2)]
        cluster.wait_for_nodes()
    except Exception as error:
        raise CannotRun(f"Ray does not start here: {type(error).__name__}: {error}") from error
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    try:
        yield cluster.address, lambda: cluster.remove_node(others[0], allow_graceful=False)
    finally:
        cluster.shutdown()


def ray_node_killed(runs: Runs) -> Outcome:
    """Shards on three nodes; one that makes some is killed."""
    work, out = runs.work, runs.work / "set"
    with ray_cluster() as (address, kill_a_node):
        sums = sums_of_one_machine(runs)
        run = runs.popen(command(work, out, "--ray", address), "run")
        wait_for_shards(out, SOME)
        kill_a_node()
        at_death = len(list(out.glob("*_stats.json")))
        code = runs.code(run)
    same = (out / "SHA256SUMS").is_file() and (out / "SHA256SUMS").read_text() == sums
    left = "nothing" if not list(out.glob(".*")) else "something"
    got = f"exit {code}, {'same' if same else 'other'} SHA256SUMS, {left} left over"
    if not SOME <= at_death < SHARDS:
        got += f", but {at_death} of {SHARDS} shards were complete when the node died"
    return Outcome("exit 0, same SHA256SUMS, nothing left over", got, runs.said("run"))


def evaluated_on_ray(runs: Runs) -> Outcome:
    """The images of a model on three nodes, of which one is killed, against one machine."""
    line = [sys.executable, "-m", "evaluation.evaluate", "--model", "data/toy/student", "--device", "cpu"]
    line += ["--samples", "96", "--batch_size", "3", "--metrics", "fid", "clip_score", "--out"]
    numbers, work = {}, runs.work
    with ray_cluster() as (address, kill_a_node):
        alone = runs.code(runs.popen([*line, str(work / "alone.json"), "--processes", "1"], "alone"))
        run = runs.popen([*line, str(work / "ray.json"), "--ray", address], "run")
        wait_until(lambda: run.poll() is not None or len(list(work.glob("ray.work/*/batch_*"))) >= SOME)
        kill_a_node()
        killed = "killed" if run.poll() is None else "over before"
        codes = alone, runs.code(run)
    for name in ("alone", "ray"):
        file = work / f"{name}.json"
        numbers[name] = json.loads(file.read_text())["metrics"] if file.is_file() else name
    same = "same" if numbers["alone"] == numbers["ray"] else "other"
    got = f"exit {codes[0]} and {codes[1]}, {killed}, {same} numbers"
    return Outcome("exit 0 and 0, killed, same numbers", got, runs.said("run"))


def s3_that_fails(runs: Runs) -> Outcome:
    """Two commands at once that write to S3, one killed in the middle; then a copy from S3 to S3. Every seventh write is
    answered by 500, and every 40th request late.
    """
    wanted = "exit -9 and 0, same SHA256SUMS; from S3 to S3: exit 0, same SHA256SUMS; 500 answered"
    if any(importlib.util.find_spec(name) is None for name in ("moto", "s3fs")):
        raise CannotRun("uv sync --group drills")
    work = runs.work
    sums = sums_of_one_machine(runs)
    with _faulty_s3() as (address, failed):
        keys = dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "drill")
        place = {**keys, "AWS_ENDPOINT_URL": address, "AWS_DEFAULT_REGION": "us-east-1"}
        os.environ |= place
        from data.prepare.common.set_folder import open_set_folder
        from data.shards.remote.patience import Patience

        _bucket("bucket")
        out = open_set_folder("s3://bucket/set", Patience())
        line = command(work, "s3://bucket/set", "--processes", "1", "--remote_timeout_s", "2")
        commands = [runs.popen(line, f"run{number}") for number in range(2)]
        wait_until(lambda: sum("_stats" in name for name in out.names()) >= SOME)
        commands[0].send_signal(signal.SIGKILL)
        codes = [runs.code(one) for one in commands]
        same = (out.read("SHA256SUMS") or b"").decode() == sums
        # The same samples in other shards, by way of an index on the disk.
        here = [sys.executable, "-m", "data.prepare", "images", "--samples_per_shard", str(PER_SHARD)]
        here += ["--index_folder", str(work / "index"), "--from"]
        copies = []
        for number, source in enumerate(("s3://bucket/set/*.tar", f"{work}/alone/*.tar")):
            copy = "s3://bucket/copy" if number == 0 else str(work / "copy")
            copied = runs.code(runs.popen([*here, source, "--out", copy], f"copy{number}"))
            found = open_set_folder(copy, Patience()).read("SHA256SUMS") or b""
            copies.append((copied, found))
    got = f"exit {codes[0]} and {codes[1]}, {'same' if same else 'other'} SHA256SUMS; from S3 to S3: exit {copies[0][0]}, "
    got += f"{'same' if copies[0][1] == copies[1][1] else 'other'} SHA256SUMS; {'500' if failed() else 'nothing'} answered"
    return Outcome(wanted, got, runs.said("run0") + runs.said("run1") + runs.said("copy0"))


@contextmanager
def _faulty_s3() -> Iterator[tuple[str, Callable[[], int]]]:
    """A real S3 server on loopback, moto's, that fails at times; its address, and the number of failures so far."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    served, writes, failures = itertools.count(1), itertools.count(1), []
    application = DomainDispatcherApplication(create_backend_app)

    def faulty(environ: Mapping[str, Any], respond: Callable[..., Any]) -> Iterable[bytes]:
        if next(served) % 40 == 0:
            time.sleep(3)
        if environ["REQUEST_METHOD"] == "PUT" and next(writes) % 7 == 0:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            failures.append(1)
            respond("500 Internal Server Error", [("Content-Length", "0")])
            return [b""]
        answer: Iterable[bytes] = application(environ, respond)
        return answer

    class Quiet(WSGIRequestHandler):
        def log(self, *_: object) -> None:
            pass

    server = make_server("127.0.0.1", 0, faulty, threaded=True, request_handler=Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.port}", lambda: len(failures)
    finally:
        server.shutdown()


def _bucket(name: str) -> None:
    import fsspec

    fsspec.filesystem("s3").mkdir(name)


PREPARING_DRILLS: dict[str, Callable[[Runs], Outcome]] = {
    "data.prepare: four commands at once, kill -9 of one": commands_at_once,
    "data.prepare: Ray on three nodes, one killed": ray_node_killed,
    "evaluate --model: Ray on three nodes, one killed": evaluated_on_ray,
    "data.prepare: S3 that fails and is slow, kill -9 of one of two": s3_that_fails,
}
