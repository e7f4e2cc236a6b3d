"""What a condition image is made by while samples are read; data/conditions.py has the ones that are shipped."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class ImageCondition(Protocol):
    """Makes a condition image, such as edges or depth, of a picture. A pure function: the same bytes each time.

    In YAML it is named by class_path. It is called in the reading processes, so it has to be picklable.
    """

    def __call__(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """From a picture (H, W, 3), uint8 RGB, to its condition image, (H, W, 3), uint8."""
        ...
