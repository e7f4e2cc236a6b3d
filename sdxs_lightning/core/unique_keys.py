"""JSON objects whose keys differ."""

from collections import Counter
from typing import Any


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, for `object_pairs_hook`; the json module keeps the last value of a key, and the others would be lost.

    Raises:
        ValueError: naming a key that occurs twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        key = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"an object has the key {key!r} twice")
    return found
