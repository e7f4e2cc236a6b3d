"""Locations of shards in one run of bytes, as a packed index holds them: a large set has no object for each."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from operator import eq

import numpy as np
from numpy.typing import NDArray

from data.shards.indexing.on_demand import OnDemand

_AT_ONCE = 1024


class LocationList(OnDemand[str]):
    """Decodes a location when it is asked for.

    Args:
        text: (bytes,), uint8, the locations in UTF-8 one after another.
        ends: (n,), int64, where each ends.
    """

    def __init__(self, text: NDArray[np.uint8], ends: NDArray[np.int64]) -> None:
        self.text, self.ends = text, ends

    @classmethod
    def of(cls, locations: Sequence[str]) -> "LocationList":
        """The list of strings in memory."""
        if isinstance(locations, cls):
            return locations
        encoded = [location.encode("utf-8", "surrogateescape") for location in locations]
        ends = np.cumsum([len(one) for one in encoded], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), dtype=np.uint8), ends)

    @classmethod
    def joined(cls, lists: Sequence[Sequence[str]]) -> "LocationList":
        """Several lists, one after another."""
        parts = [cls.of(one) for one in lists]
        lengths = [len(one.text) for one in parts]
        firsts = (np.cumsum(lengths) - lengths).tolist()
        ends = [one.ends + first for one, first in zip(parts, firsts, strict=True)]
        return cls(np.concatenate([one.text for one in parts]), np.concatenate(ends))

    def __len__(self) -> int:
        """Locations."""
        return len(self.ends)

    def item(self, number: int) -> str:
        """A location."""
        start = int(self.ends[number - 1]) if number else 0
        return _decoded(self.text[start : int(self.ends[number])])

    def __iter__(self) -> Iterator[str]:
        start = 0
        for first in range(0, len(self.ends), _AT_ONCE):
            ends = self.ends[first : first + _AT_ONCE].tolist()
            text = self.text[start : ends[-1]].tobytes()
            for one, other in pairwise([0, *(end - start for end in ends)]):
                yield text[one:other].decode("utf-8", "surrogateescape")
            start = ends[-1]

    def __eq__(self, other: object) -> bool:
        """Whether another sequence holds the same locations."""
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(map(eq, self, other))

    __hash__ = None  # type: ignore[assignment]


def _decoded(text: NDArray[np.uint8]) -> str:
    return text.tobytes().decode("utf-8", "surrogateescape")
