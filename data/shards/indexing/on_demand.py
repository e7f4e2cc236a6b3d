"""Sequences whose items are made when they are asked for."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import TypeVar, overload

Item = TypeVar("Item")


class OnDemand(Sequence[Item]):
    """A sequence that holds no object for each item; a slice is a list."""

    @abstractmethod
    def item(self, number: int) -> Item:
        """Makes an item; `number` counts from 0 and is in range."""

    @overload
    def __getitem__(self, number: int) -> Item: ...

    @overload
    def __getitem__(self, number: slice) -> list[Item]: ...

    def __getitem__(self, number: int | slice) -> Item | list[Item]:
        """The item of a number, or those of a slice."""
        if isinstance(number, slice):
            return [self.item(one) for one in range(len(self))[number]]
        return self.item(range(len(self))[number])
