"""The store of a restarted torchrun: every attempt agrees on a prefix of its own, whatever earlier ones left behind."""

from __future__ import annotations

import threading
import time
from datetime import timedelta

import pytest
from torch._C._distributed_c10d import HashStore, Store

from sdxs_lightning.callbacks.elastic import fresh_prefix

MINUTE = timedelta(minutes=1)


def attempt(store: Store, late: int | None = None, count: int = 3) -> list[str]:
    prefixes = [""] * count

    def join(rank: int) -> None:
        if rank == late:
            time.sleep(0.3)
        prefixes[rank] = fresh_prefix(store, rank, count, MINUTE)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return prefixes


@pytest.mark.parametrize("late", [0, 2])
def test_every_attempt_has_a_prefix_of_its_own(late: int) -> None:
    store = HashStore()
    # An attempt in which rank 2 died before it was answered, and rank 1 after.
    store.set("sdxs/announced/2", "dead")
    store.set("sdxs/announced/1", "also dead")
    store.set("sdxs/answer/also dead", "old")
    store.set("sdxs/confirmed/old/1", "")
    attempts = [attempt(store, late) for _ in range(3)]
    assert all(len(set(prefixes)) == 1 for prefixes in attempts)
    assert len({prefixes[0] for prefixes in attempts} | {"old"}) == 4


def test_a_rank_that_does_not_come_is_named() -> None:
    with pytest.raises(TimeoutError, match=r"ranks \[1\] did not join within 0 s"):
        fresh_prefix(HashStore(), 0, 2, timedelta(seconds=0.1))
