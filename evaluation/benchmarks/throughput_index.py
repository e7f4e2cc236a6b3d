"""Opening the index of a large set on a node: one packed index against a sidecar for each shard, in one run.

Every process opens the set, checks its members and looks up the first positions, as a rank does, and holds it until all have.
CPU time and memory are those added since before; memory is the proportional set size, which divides shared pages among their
processes. The processes are started anew, as ranks are: a forked one would count the pages of its parent that it touches.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data.shards.dataset import ShardDataset
from data.shards.images import fast_jpeg_decoder
from data.shards.index import ShardSet, discard_outdated, index_shard
from data.shards.order.sample_order import SampleOrder
from data.shards.scan import scan_members
from data.shards.sidecar import save_sidecar, sidecar_path
from data.shards.store import ShardStore
from data.shards.tar_headers import TarMember

if TYPE_CHECKING:
    from evaluation.benchmarks.throughput import IndexOptions

_MEMBERS = {"jpg": 100_000, "json": 400, "txt": 80}
"""Extensions and their sizes in bytes."""
_GOAL_SECONDS, _GOAL_MEGABYTES = 1.0, 100.0
_POSITIONS = 4096


def run(options: IndexOptions) -> dict[str, Any]:
    """Measure both ways; the goals are for 10,000 shards of 1,000 samples."""
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        write_set(Path(folder), options.shards, options.samples_per_shard)
        first = _measure(_open_packed, Path(folder), 1)  # the packed index is made
        packed = _measure(_open_packed, Path(folder), options.processes)
        sidecars = _measure(_open_sidecars, Path(folder), options.sidecar_processes)
    if len({*packed.pop("orders"), *sidecars.pop("orders"), *first.pop("orders")}) != 1:
        return {"failed": "the packed index and the sidecars gave different samples"}
    each = {
        name: sidecars[name] / options.sidecar_processes / (packed[name] / options.processes)
        for name in ("cpu_seconds", "megabytes")
    }
    return {
        "shards": options.shards,
        "samples_per_shard": options.samples_per_shard,
        "first_time": first,
        "packed": packed,
        "sidecars": sidecars,
        "sidecars_to_packed_per_process": each,
        "sidecars_to_making_the_packed_index": sidecars["cpu_seconds"]
        / options.sidecar_processes
        / first["cpu_seconds"],
        "goals": {
            "cpu_seconds": _GOAL_SECONDS,
            "megabytes": _GOAL_MEGABYTES,
            "met": packed["cpu_seconds"] <= _GOAL_SECONDS and packed["megabytes"] <= _GOAL_MEGABYTES,
        },
    }


def write_set(folder: Path, shards: int, samples: int) -> None:
    """Sparse files in place of tars, and sidecars that describe their samples."""
    members, at = [], 0
    for row in range(samples):
        for extension, size in _MEMBERS.items():
            members.append(TarMember(f"{row:09d}.{extension}", at + 512, size))
            at += 512 + -(-size // 512) * 512
    store = ShardStore()
    index = scan_members("", members)
    for number in range(shards):
        path = folder / f"{number:05d}.tar"
        with open(path, "wb") as file:
            file.truncate(at + 1024)
        save_sidecar(sidecar_path(path), index, store.stamp(str(path)))


def _measure(opened: Any, folder: Path, processes: int) -> dict[str, Any]:
    """Sums over processes that hold a set at the same time."""
    context = multiprocessing.get_context("spawn")
    everyone, results = context.Barrier(processes), context.SimpleQueue()
    started = [
        context.Process(target=_process, args=(opened, folder, number, everyone, results))
        for number in range(processes)
    ]
    for one in started:
        one.start()
    found = [results.get() for _ in started]
    for one in started:
        one.join()
    return {
        "processes": processes,
        "cpu_seconds": sum(one[0] for one in found),
        "megabytes": sum(one[1] for one in found),
        "orders": [one[2] for one in found],
    }


def _process(opened: Any, folder: Path, number: int, everyone: Any, results: Any) -> None:
    fast_jpeg_decoder()  # a library, which any set of images loads
    everyone.wait()
    before, start = _megabytes(), time.process_time()
    if number == 0 and opened is _open_packed:
        discard_outdated(str(folder), None, ShardStore(), tolerant=False)  # by one process of a node
    found = opened(folder)
    order = SampleOrder(found.sizes, seed=1)
    dataset = ShardDataset(found, order, ["images"])
    samples = order.samples_at(np.arange(_POSITIONS))
    assert dataset.shards.fingerprint  # compared with the checkpoint's when a run is resumed
    seconds = time.process_time() - start
    everyone.wait()
    megabytes = _megabytes() - before
    everyone.wait()
    results.put(
        (seconds, megabytes, dataset.shards.fingerprint + hashlib.sha256(samples.tobytes()).hexdigest())
    )


def _open_packed(folder: Path) -> ShardSet:
    return ShardSet.open(str(folder), checked=True)


def _open_sidecars(folder: Path) -> ShardSet:
    return ShardSet(tuple(index_shard(path) for path in sorted(folder.glob("*.tar"))))


def _megabytes() -> float:
    lines = Path(f"/proc/{os.getpid()}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024 / 1e6
