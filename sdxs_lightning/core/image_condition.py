"""The interface of what makes condition images from images; `data/conditions.py` has implementations."""

from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray


@runtime_checkable
class ImageCondition(Protocol):
    """Computes a condition image, such as edges or depth, from an image. A pure, deterministic function.

    Given by class_path in YAML. It is called in worker processes, so it must be picklable.
    """

    def __call__(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Condition image (H, W, 3), uint8, of an image (H, W, 3), uint8 RGB."""
        ...


def description_of(condition: ImageCondition) -> str:
    """Name and settings of a condition, without the device: "Canny(low=10, high=30, vary=0.0)"."""
    # As it is sent to workers: without a network that it loads at its first image; of a class with __slots__ several parts.
    state: Any = condition.__getstate__()
    parts = state if isinstance(state, tuple) else (state,)
    # A frozen dataclass with slots lists its values.
    own = [part if isinstance(part, dict) else dict(enumerate(part)) for part in parts if part]
    settings = [
        f"{name}={value!r}"
        for part in own
        for name, value in part.items()
        if name != "device" and _is_plain(value)
    ]
    return f"{type(condition).__name__}({', '.join(settings)})"


def _is_plain(value: Any) -> bool:
    """Whether a value prints as what it says, and not as where it lies."""
    if isinstance(value, dict):
        return _is_plain([*value.items()])
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, int | float | str)
