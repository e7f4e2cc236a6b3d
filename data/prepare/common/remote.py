"""Shards that may lie elsewhere: the options of the cache, and opening shards through it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from data.prepare.common.option_types import at_least
from data.shards.index import ShardSet
from data.shards.shard_cache import ShardCache
from data.shards.store import ShardStore


@dataclass(frozen=True)
class Reach:
    """How shards are reached."""

    cache_folder: str | None = None
    """Where remote ones, and their indexes, are kept; None reads them by ranges and needs an index folder."""
    cache_gb: int = 100
    """10^9 bytes that the cache may hold."""
    index_folder: str | None = None
    """Where indexes are kept if neither beside the shards nor in the cache."""

    @classmethod
    def of(cls, options: argparse.Namespace) -> Reach:
        """By the options that `add_cache` adds."""
        return cls(options.cache_folder, options.cache_gb, getattr(options, "index_folder", None))

    @property
    def indexes(self) -> str | None:
        """Folder of the indexes; None: beside the shards."""
        return self.index_folder or self.cache_folder

    def store(self) -> ShardStore:
        """A store for this process."""
        return ShardStore(None if self.cache_folder is None else ShardCache(self.cache_folder, self.cache_gb))

    def open(self, shards: str | Sequence[str]) -> ShardSet:
        """The index of shards; see `ShardSet.open` for what it raises."""
        return ShardSet.open(shards, self.indexes, self.store())


def add_cache(add: Callable[..., object]) -> None:
    """Adds `--cache-folder` and `--cache-gb`."""
    add("--cache-folder", help="for shards that are URLs or pipe: commands: where they are kept")
    add("--cache-gb", type=at_least(1), default=100, help="that it may hold (default: %(default)s)")
