"""A condition that no public detector makes: a bar whose length states the background of a toy image.

Captions of pairs do not state the background, so a student that follows the bar has learnt it from images with bars alone.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from data.toy.shape_fit import nearest_background
from data.toy.world import BACKGROUNDS, IMAGE_PX

STEP_PX = IMAGE_PX // len(BACKGROUNDS)
"""The bar of the first background has this length, each further one as much again."""


def background_bar(background: str) -> NDArray[np.uint8]:
    """(32, 32, 3): a white bar on black, in the middle rows, from the left edge."""
    image = np.zeros((IMAGE_PX, IMAGE_PX, 3), dtype=np.uint8)
    length = STEP_PX * (1 + list(BACKGROUNDS).index(background))
    image[IMAGE_PX // 2 - 2 : IMAGE_PX // 2 + 2, :length] = 255
    return image


class BackgroundBar:
    """The bar of the background that an image's edge pixels show, for every image of the toy world the true one."""

    def __call__(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return background_bar(nearest_background(torch.from_numpy(image).permute(2, 0, 1).float()))
