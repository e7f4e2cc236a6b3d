"""The interface of what makes condition images from images; `data/conditions.py` has implementations."""

from typing import Protocol, runtime_checkable

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
    settings = {
        name: value
        for name, value in vars(condition).items()
        if isinstance(value, int | float | str) and name != "device"
    }
    return f"{type(condition).__name__}({', '.join(f'{name}={value!r}' for name, value in settings.items())})"
