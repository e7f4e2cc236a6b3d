"""Ranks of a distributed run, as processes that need not import torch and Lightning each time.

A fork server imports them once per session; importing takes longer than any of the runs.
"""

from __future__ import annotations

import gc
import multiprocessing
import multiprocessing.forkserver
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

PRELOAD = [
    "data.shards.datamodule",
    "sdxs_lightning.callbacks.export",
    "sdxs_lightning.cli",
    "sdxs_lightning.families.sd",
    "transformers.models.clip.modeling_clip",
    "tests.helpers.ranks.evaluation_worker",
    "tests.helpers.ranks.metric_ranks",
    "tests.helpers.ranks.distributed_worker",
    "tests.helpers.faults",
    # What a run of two sharded ranks imports later, each rank by itself.
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "lightning.pytorch.strategies.model_parallel",
    "sdxs_lightning.callbacks.interruption",
    "sdxs_lightning.stages.distillation.step",
    "torch._dynamo",
    "torch.distributed.checkpoint",
]


class Ended(NamedTuple):
    """How a rank ended."""

    code: int
    said: str
    """What it wrote to stderr."""


def start_fork_server() -> None:
    """Starts it now, at the priority that this process has now; it imports in the background."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOAD)
    multiprocessing.forkserver.ensure_running()


def train_in_ranks(
    arguments: Sequence[str], folder: Path, count: int = 2, seconds: float = 600
) -> list[Ended]:
    """Runs `train.py`'s command line in `count` processes of one machine, as a cluster's launcher does.

    Args:
        arguments: the command line; it has to ask for `count` devices.
        folder: for what the ranks say.
        count: of ranks.
        seconds: after which all are killed.
    """
    return in_ranks(_train, (list(arguments),), folder, count, seconds)


def in_ranks(
    function: Callable[..., int | None],
    arguments: tuple[Any, ...],
    folder: Path,
    count: int = 2,
    seconds: float = 600,
) -> list[Ended]:
    """Calls a function in `count` processes that know each other's address; one CPU thread each.

    Args:
        function: of a module; what it returns is the exit code.
        arguments: the same for each rank; `LOCAL_RANK` in the environment tells them apart.
        folder: for what the ranks say.
        count: of ranks.
        seconds: after which all are killed.
    """
    start_fork_server()  # does nothing if it runs
    context = multiprocessing.get_context("forkserver")
    port = _free_port()
    files = [folder / f"rank_{rank}.txt" for rank in range(count)]
    ranks = [
        context.Process(target=_call, args=(function, arguments, rank, count, port, file), daemon=True)
        for rank, file in enumerate(files)
    ]
    for rank in ranks:
        rank.start()
    end = time.monotonic() + seconds
    try:
        for rank in ranks:
            rank.join(max(0.0, end - time.monotonic()))
        late = [number for number, rank in enumerate(ranks) if rank.exitcode is None]
        said = [file.read_text() if file.exists() else "" for file in files]
        assert not late, f"ranks {late} did not end in {seconds} s; they said: {said}"
        return [Ended(rank.exitcode or 0, text) for rank, text in zip(ranks, said, strict=True)]
    finally:
        for rank in ranks:
            if rank.is_alive():
                rank.kill()


def _call(
    function: Callable[..., int | None],
    arguments: tuple[Any, ...],
    rank: int,
    count: int,
    port: int,
    file: Path,
) -> None:
    os.environ |= {
        "LOCAL_RANK": str(rank),
        "NODE_RANK": "0",
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "CUDA_VISIBLE_DEVICES": "",
    }
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    import torch

    gc.freeze()  # what the fork server imported is not walked through at each collection
    torch.set_num_threads(1)
    sys.exit(function(*arguments))


def _train(arguments: list[str]) -> int:
    from sdxs_lightning.cli import main

    return main(arguments)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
