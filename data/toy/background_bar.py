"""A condition that no detector makes: a bar whose length states the background of the image.

Captions of pairs do not state the background, so a student that follows the bar has learnt it from images with bars alone.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from data.toy.world import BACKGROUNDS, IMAGE_PX, Split, scene_at

STEP_PX = IMAGE_PX // len(BACKGROUNDS)
"""The bar of the first background has this length, each further one as much again."""


def background_bar(background: str) -> Tensor:
    """(3, 32, 32) uint8: a white bar on black, in the middle rows, from the left edge."""
    image = np.zeros((3, IMAGE_PX, IMAGE_PX), dtype=np.uint8)
    length = STEP_PX * (1 + list(BACKGROUNDS).index(background))
    image[:, IMAGE_PX // 2 - 2 : IMAGE_PX // 2 + 2, :length] = 255
    return torch.from_numpy(image)


def bar_at(split: Split, index: int) -> Tensor:
    """The bar of the image at an index of a split: (3, 32, 32) uint8."""
    background = scene_at(split, index).background
    assert background is not None  # only parsed captions lack one
    return background_bar(background)
