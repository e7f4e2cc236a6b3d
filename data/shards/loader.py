"""The training loader: global batches by number, starting at the Trainer's batch counter.

Lightning saves no position of a plain loader, and that of a stateful one on rank 0 only and including prefetched batches.
The number of completed batches is in every checkpoint, the same on all ranks and unaffected by prefetching. It is read at
the first batch of each pass, because Lightning creates the iterator before it restores its counters.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from data.shards.dataset import ShardDataset
from data.shards.faults import UnreadableBatch
from sdxs_lightning.core.batch import TrainingBatch
from sdxs_lightning.core.child_process import kill_children_at_exit, leave_signals_to_parent


@dataclass(frozen=True)
class Pass:
    """One pass over the loader: `count` global batches, starting with number `first`."""

    first: int
    count: int


class RankPositions(Sampler[list[int]]):
    """One rank's positions in each global batch: batch g covers [g B, (g + 1) B), rank r its r-th slice."""

    def __init__(self, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        """Store the layout; `batch_size` is per rank."""
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.current = Pass(0, 0)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the positions of each batch of the current pass."""
        for batch in range(self.current.first, self.current.first + self.current.count):
            start = (batch * self.world_size + self.rank) * self.batch_size
            yield list(range(start, start + self.batch_size))

    def __len__(self) -> int:
        """Batches in the current pass."""
        return self.current.count


class ShardLoader:
    """Yields `TrainingBatch`es. Not a DataLoader, because Lightning would replace its sampler under DDP."""

    def __init__(
        self,
        dataset: ShardDataset,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        pin_memory: bool = False,
        next_pass: Callable[[int], Pass] | None = None,
    ) -> None:
        """Divide positions into batches.

        Args:
            dataset: reads the samples.
            batch_size: samples per batch on this rank.
            rank: data-parallel rank.
            world_size: number of data-parallel ranks.
            num_workers: worker processes; 0 reads in this process. The batches do not depend on it.
            pin_memory: whether to use page-locked memory, for asynchronous copies to a GPU.
            next_pass: maps the number of batches in an epoch to the next pass; by default a complete epoch each.

        Raises:
            ValueError: if one global batch has more samples than there are.
        """
        self.dataset = dataset
        self.batches_per_epoch = len(dataset) // (batch_size * world_size)
        if self.batches_per_epoch == 0:
            raise ValueError(
                f"The shards hold {len(dataset)} samples, fewer than one global batch of "
                f"{batch_size * world_size} (data.batch_size {batch_size} on {world_size} devices); lower "
                "data.batch_size or add shards."
            )
        self._next_pass = next_pass or self._following
        self._following_first = 0
        self._positions = RankPositions(batch_size, rank, world_size)
        self._options: dict[str, Any] = {"num_workers": num_workers, "pin_memory": pin_memory}
        self._loader: DataLoader[TrainingBatch | UnreadableBatch] | None = None

    def __len__(self) -> int:
        """Batches in an epoch. Remaining samples begin the next epoch, so none is dropped."""
        return self.batches_per_epoch

    def __iter__(self) -> Iterator[TrainingBatch]:
        """One pass; its start is determined when the first batch is requested."""
        self._positions.current = self._next_pass(len(self))
        if self._loader is None:
            self._loader = self._open()
        for batch in self._loader:
            if isinstance(batch, UnreadableBatch):
                raise batch.error
            yield batch

    def close(self) -> None:
        """Stop the workers; the next pass starts new ones."""
        self._loader = None
        self.dataset.close()

    def state_dict(self) -> dict[str, Any]:
        """Empty, since the position is in the Trainer's counters; its presence tells Lightning that the loader can resume."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Does nothing: the position is in the Trainer's counters."""

    def _open(self) -> DataLoader[TrainingBatch | UnreadableBatch]:
        kill_children_at_exit()
        return DataLoader(
            self.dataset,
            batch_size=None,  # a list of positions is one item: workers build complete batches
            sampler=self._positions,
            persistent_workers=self._options["num_workers"] > 0,
            worker_init_fn=leave_signals_to_parent,
            # Its own generator: by default creating an iterator draws from torch's global one.
            generator=torch.Generator(),
            **self._options,
        )

    def _following(self, count: int) -> Pass:
        first = self._following_first
        self._following_first += count
        return Pass(first, count)
