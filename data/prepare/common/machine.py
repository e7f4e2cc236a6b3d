"""What this machine offers to a command: GPUs or a CPU, and how many processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from data.prepare.common.processes import available_cores
from sdxs_lightning.core.errors import UserError


@contextmanager
def same_bits(device: str) -> Iterator[None]:
    """Inside, a CPU computes the same bits whatever the number of processes: with one thread, since sums over several are
    cut elsewhere.
    """
    before = torch.get_num_threads()
    if device == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def choose_device(named: str) -> str:
    """What `--device` means here: "cpu" or "cuda".

    Args:
        named: "auto", "cpu" or "cuda".

    Raises:
        UserError: for cuda where there is none.
    """
    if named == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if named == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is cuda and this machine has no GPU that torch can use; give --device cpu.")
    return named


def device_of(device: str, process: int) -> torch.device:
    """The GPUs are dealt out in turn."""
    if device == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", process % torch.cuda.device_count())


def default_processes(device: str) -> int:
    """One a GPU; without any, one a core, but no more than 8: each holds the networks."""
    return torch.cuda.device_count() if device == "cuda" else min(available_cores(), 8)
