"""Devices and processes of this machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from data.prepare.common.processes import available_cores
from sdxs_lightning.core.errors import UserError


@contextmanager
def same_bits(device: str) -> Iterator[None]:
    """Makes results on a CPU independent of the number of processes, by computing with one thread: sums over several threads
    are split, and so rounded, differently.
    """
    before = torch.get_num_threads()
    if device == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def choose_device(device: str) -> str:
    """Resolves `--device` to "cpu" or "cuda".

    Args:
        device: "auto", "cpu" or "cuda".

    Raises:
        UserError: for cuda where there is none.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is cuda and this machine has no GPU that torch can use; give --device cpu.")
    return device


def device_of(device: str, process: int) -> torch.device:
    """The device of one process; several processes share the GPUs round-robin."""
    if device == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", process % torch.cuda.device_count())


def default_processes(device: str) -> int:
    """One per GPU; without any, one per core, but no more than 8: each holds a copy of the networks."""
    return torch.cuda.device_count() if device == "cuda" else min(available_cores(), 8)
