"""What is drawn anew each time a sample is visited: its crop, whether it is mirrored, which caption it has.

Like noise and timesteps (sdxs_lightning/seeding.py) each draw has an address, the seed and the sample's
position, instead of a generator with a state, so a run that is resumed draws the same.
"""

from enum import IntEnum

from data.shards.order import key_of

_CHOICES = 3  # parts of keys that the order uses begin with 0, 1 and 2 after the epoch or the seed


class Draw(IntEnum):
    """What is drawn. Append only: a changed value changes every run of that seed."""

    CROP_TOP = 0
    CROP_LEFT = 1
    FLIP = 2
    CAPTION = 3


def draw(seed: int, position: int, what: Draw, count: int) -> int:
    """A uniform whole number in [0, count)."""
    return key_of(seed, _CHOICES, position, what) * count >> 64
