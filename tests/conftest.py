"""The suite runs offline, on two cores, without leaving anything behind."""

import os

# Before torch and the hub libraries are imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Their warnings of the import would come between the dots, from the fork server.
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# One process per core: with two threads each they would wait for one another. Workers inherit what the first process set.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("MPLBACKEND", "Agg")
# Gloo asks the resolver for the machine's name, which a machine without network may not have.
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

import functools
import gc
import sys
import time
from typing import Any

# Images often forbid bytecode: each of the suite's processes would compile its libraries anew, more than half of its start.
if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):
    sys.dont_write_bytecode = False

import jsonargparse._typehints
import pytest
import torch

from tests.helpers.ranks.processes import start_fork_server

STARTED = pytest.StashKey[float]()
REFERENCE_SECONDS = 0.18
"""Of `fixed_computation` on the two idle cores (AMD EPYC 7003, 2.4 GHz) for which the limit below is meant."""


def fixed_computation() -> float:
    """Seconds of one core for convolutions, Python calls and small tensors, roughly in the suite's proportions."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    images, kernel = torch.ones(4, 32, 32, 32), torch.ones(32, 32, 3, 3)
    start = time.perf_counter()
    for _ in range(60):
        torch.nn.functional.conv2d(images, kernel, padding=1)
    total, small = 0, torch.ones(8)
    for i in range(100_000):
        total += len(str(i))
        if i % 5 == 0:
            small = small * 1.0
    torch.set_num_threads(threads)
    return time.perf_counter() - start


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Says how slow this machine is, so that the suite's limit of time can be read on any."""
    if "PYTEST_XDIST_WORKER" in os.environ or config.option.collectonly:
        return
    slowness = min(fixed_computation() for _ in range(3)) / REFERENCE_SECONDS
    seconds = time.monotonic() - config.stash[STARTED]
    terminalreporter.write_line(
        f"{seconds:.0f} s on a machine {slowness:.2f} times as slow as the reference (tests/conftest.py): "
        f"{seconds / slowness:.0f} s there; the limit for the suite is 480 s"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Small networks gain nothing from many threads, and many tests start processes of their own.

    Ranks meet thousands of times in a test, and on a full machine each would wait for its turn at every meeting. So they
    come before the workers, which only compute.
    """
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    # A quarter of the time of a parse: signatures of the same classes are compared again at each value.
    typehints: Any = jsonargparse._typehints
    typehints.implements_protocol = functools.cache(typehints.implements_protocol)
    config.stash[STARTED] = time.monotonic()
    if "PYTEST_XDIST_WORKER" in os.environ:
        start_fork_server()
        os.nice(5)


def pytest_collection_finish() -> None:
    """Takes what is imported out of the garbage collector's sight, which would walk through it at each full collection."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """The interpreter cleans up everything at its end, or nanobind, of Triton, prints what leaks."""
    gc.unfreeze()


LONG_FILES = (
    "test_distributed.py",
    "test_configs.py",
    "test_hybrid.py",
    "test_method.py",
    "test_export_runtime.py",
    "test_mixture.py",
    "test_interruption.py",
    "test_plan_command.py",
    "test_prepare_pairs.py",
    "test_gpu_benchmark.py",
    "test_lora_distributed.py",
    "test_run_identity.py",
    "test_checkpoint_choice.py",
    "test_prepare_images.py",
    "test_distributed_metrics.py",
    "test_prepare_latents.py",
)
"""Begun first, or at the end one worker would wait for the other: minutes, in few tests each. Files that start pairs of
processes stand beside files that start none, since four processes on two cores mostly wait for each other."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begins with the long files, and skips what needs a GPU where there is none."""
    rank = {name: i for i, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a GPU")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
