"""The suite runs offline, on two cores, without leaving anything behind."""

import os

# Before torch and the hub libraries are imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# One process per core: with two threads each they would wait for one another. Workers inherit what the first process set.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("MPLBACKEND", "Agg")
# Gloo asks the resolver for the machine's name, which a machine without network may not have.
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

import pytest
import torch

from tests.helpers.processes import start_fork_server


def pytest_configure(config: pytest.Config) -> None:
    """Small networks gain nothing from many threads, and many tests start processes of their own.

    Ranks meet thousands of times in a test, and on a full machine each would wait for its turn at every meeting. So they
    come before the workers, which only compute.
    """
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if "PYTEST_XDIST_WORKER" in os.environ:
        start_fork_server()
        os.nice(5)


LONG_FILES = (
    "test_distributed.py",
    "test_method.py",
    "test_mixture.py",
    "test_interruption.py",
    "test_plan_command.py",
    "test_prepare_pairs.py",
    "test_lora_distributed.py",
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
