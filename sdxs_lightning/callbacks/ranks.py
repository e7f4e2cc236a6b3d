"""Agreement between ranks on host-side events, such as a signal or a full disk.

A rank that stops, saves or fails alone leaves the others waiting in a collective until they are killed. So such events are
first shared with all ranks, over gloo with host tensors, which unlike the training's process group does not synchronise with
the accelerator.
"""

from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


class Ranks:
    """The ranks of this run; with a single process every method returns at once."""

    def __init__(self) -> None:
        self._group: dist.ProcessGroup | None = None

    @property
    def count(self) -> int:
        """Number of ranks."""
        return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1

    @property
    def number(self) -> int:
        """This process's rank."""
        return 0 if self.count == 1 else dist.get_rank()

    @property
    def first(self) -> bool:
        """Whether this process is rank 0, which alone writes files and messages."""
        return self.number == 0

    def highest(self, value: int) -> int:
        """The largest of the ranks' values. A collective: all ranks must call it."""
        if self.count == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.int64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.host_group())
        return int(tensor.item())

    def gathered(self, value: T) -> list[T]:
        """The ranks' values, in the order of ranks, on all ranks. A collective."""
        if self.count == 1:
            return [value]
        values: list[T | None] = [None] * self.count
        dist.all_gather_object(values, value, group=self.host_group())
        return values  # type: ignore[return-value]  # none is left

    def of_first(self, value: T) -> T:
        """Rank 0's value, on all ranks. A collective."""
        return self.gathered(value)[0]

    def first_message(self, message: str | None) -> str | None:
        """The message of the lowest rank that has one, on all ranks. A collective."""
        return next((one for one in self.gathered(message) if one), None)

    def wait(self) -> None:
        """Barrier over all ranks."""
        self.highest(0)

    def host_group(self) -> dist.ProcessGroup:
        """The gloo group of all ranks. Created with the first collective, which the main threads must call."""
        if self._group is None:
            group = dist.new_group(backend="gloo")
            assert isinstance(group, dist.ProcessGroup)  # all ranks are members
            self._group = group
        return self._group
