"""The stated attributes of a scene as class indices: the targets of the attribute classifier and of caption accuracy.

Things are ordered by position (left or top first), so an image has the same attributes whatever its caption's order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from data.toy.world import BACKGROUNDS, COLOURS, SHAPES, SIZES, Scene, Thing

NOT_STATED = -1

# The last class of the second thing's attributes means that there is none.
CLASSES = {
    "layout": ("single", "horizontal", "vertical"),
    "size": SIZES,
    "background": tuple(BACKGROUNDS),
    "first_colour": tuple(COLOURS),
    "first_shape": SHAPES,
    "second_colour": (*COLOURS, "none"),
    "second_shape": (*SHAPES, "none"),
}
CLASS_COUNTS = [len(names) for names in CLASSES.values()]


def attributes_of(scene: Scene) -> list[int]:
    """One class index per entry of `CLASSES`; `NOT_STATED` for what the scene leaves open."""
    first, second = scene.in_place()
    second = second or Thing("none", "none")
    stated = {
        "layout": scene.layout,
        "size": scene.size,
        "background": scene.background,
        "first_colour": first.colour,
        "first_shape": first.shape,
        "second_colour": second.colour,
        "second_shape": second.shape,
    }
    return [_index(names, stated[attribute]) for attribute, names in CLASSES.items()]


def _index(names: tuple[str, ...], name: str | None) -> int:
    return NOT_STATED if name is None else names.index(name)


def attribute_table(scenes: Sequence[Scene]) -> Tensor:
    """(B, 7) int64 class indices."""
    return torch.tensor([attributes_of(scene) for scene in scenes], dtype=torch.int64)
