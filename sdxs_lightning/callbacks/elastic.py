"""torchrun with restarts: gives every attempt its own key prefix in the store.

torchrun's agents keep one key-value store for all attempts of a run, without a prefix per attempt (torch 2.15). A gloo group
whose first rank is late then finds the addresses of the previous attempt, and the restarted run fails at once.
"""

from __future__ import annotations

import atexit
import time
import uuid
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous


def join_elastic_group(trainer: pl.Trainer) -> None:
    """Creates the default process group if torchrun started this process; Lightning then uses the existing group."""
    if not dist.is_available() or not dist.is_torchelastic_launched() or dist.is_initialized():
        return
    strategy: Any = trainer.strategy
    if not hasattr(strategy, "_get_process_group_backend"):
        return  # a single process
    store, rank, count = next(rendezvous("env://"))
    timeout = getattr(strategy, "_timeout", None) or timedelta(minutes=30)
    dist.init_process_group(
        strategy._get_process_group_backend(),
        store=PrefixStore(fresh_prefix(store, rank, count, timeout), store),
        rank=rank,
        world_size=count,
        timeout=timeout,
        device_id=None if strategy.root_device.type == "cpu" else strategy.root_device,
    )
    atexit.register(_destroy)


def fresh_prefix(store: Store, rank: int, count: int, timeout: timedelta) -> str:
    """Agrees on a key prefix that all ranks of this attempt share and no other attempt uses.

    Each rank announces a nonce. Rank 0 answers every nonce, including stale ones of earlier attempts, with the prefix, until
    each rank has confirmed the prefix.

    Args:
        store: shared by the ranks; may hold keys of earlier attempts.
        rank: rank of this process.
        count: number of ranks.
        timeout: how long to wait for the slowest rank.

    Raises:
        TimeoutError: if a rank does not join.
    """
    if rank:
        once = uuid.uuid4().hex
        store.set(f"sdxs/announced/{rank}", once)
        store.wait([f"sdxs/answer/{once}"], timeout)
        prefix: str = store.get(f"sdxs/answer/{once}").decode()
        store.set(f"sdxs/confirmed/{prefix}/{rank}", "")
        return prefix
    prefix, end = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    missing, answered = set(range(1, count)), set[str]()
    while missing:
        for other in sorted(missing):
            if store.check([f"sdxs/confirmed/{prefix}/{other}"]):
                missing.discard(other)
            elif store.check([f"sdxs/announced/{other}"]):
                once = store.get(f"sdxs/announced/{other}").decode()
                if once not in answered:
                    store.set(f"sdxs/answer/{once}", prefix)
                    answered.add(once)
        if missing and time.monotonic() > end:
            raise TimeoutError(
                f"ranks {sorted(missing)} did not join within {timeout.total_seconds():.0f} s."
            )
        time.sleep(0.05)
    return prefix


def _destroy() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
