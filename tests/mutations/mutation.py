"""What a mutation is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """A wrong line."""

    name: str
    file: str
    right: str
    """Text of the file, found exactly once."""
    wrong: str
    """What replaces it."""
    test: str
    """Test that must fail: a node of pytest, as short as possible."""
