"""How well the objects of a toy image have the shape that the caption states: the best fit of the renderer's own masks.

Two steps per object. Matting: each pixel is a mixture of the background's colour and the object's, both under varying
light; the share of the object is its coverage. Fitting: the renderer's masks of the stated shape, in all sizes, rotations and
places that the renderer draws, are compared with the coverage, and the best similarity is the object's.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from data.toy.world import BACKGROUNDS, COLOURS, IMAGE_PX, SUPERSAMPLING, Scene, parse_caption, shape_mask

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Shares of the object in a pixel."""
BACKGROUND_LIGHT = (0.6, 0.72, 0.86, 1.0, 1.14)
"""Brightness of the background, from the deepest shadow to the brightest side."""
OBJECT_LIGHT = (0.85, 1.0, 1.15)
"""Brightness of an object, across its lit side."""
TOLERANCE = 40.0
"""Standard deviation of a pixel's distance to the nearest mixture, in RGB of 0 to 255: pixels of a third colour count less."""
RADII = {"small": (4.2, 4.8, 5.4), "large": (8.4, 9.05, 9.7, 10.4), None: (5.0, 5.6, 6.2)}
"""Radii by stated size, over the renderer's range; None is one of a pair."""
ROTATIONS = (-0.13, 0.0, 0.13)
OFFSETS = (0.0, 0.5)
"""Positions within a pixel."""
_PADDED = 2 * IMAGE_PX


def shape_similarities(images_uint8: Tensor, captions: Sequence[str]) -> Tensor:
    """Similarity of each stated object with the best-fitting mask of its shape.

    Args:
        images_uint8: (B, 3, 32, 32) uint8.
        captions: B captions of the toy world.

    Returns:
        (B, 2), float32, in [0, 1]: the object at the left or top, then the other; the only object of an image twice.
    """
    images = images_uint8.float().cpu()
    rows = [_similarities(image, parse_caption(text)) for image, text in zip(images, captions, strict=True)]
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 2)


def _similarities(image: Tensor, scene: Scene) -> tuple[float, float]:
    background = torch.tensor(BACKGROUNDS[scene.background or nearest_background(image)]).float()
    first, second = scene.in_place()
    found = []
    for number, thing in enumerate((first, second)):
        if thing is None:
            continue
        share = coverage(image, background, torch.tensor(COLOURS[thing.colour]).float())
        if (
            second is not None
        ):  # each object of a pair has its own half, which tells apart two of the same colour
            share = share * _half(scene.layout, number)
        found.append(best_similarity(share, thing.shape, scene.size))
    return found[0], found[-1]


def nearest_background(image: Tensor) -> str:
    """The background whose colour is nearest to the image's edge pixels, whatever the light: (3, 32, 32), 0 to 255."""
    edge = torch.ones(IMAGE_PX, IMAGE_PX, dtype=torch.bool)
    edge[1:-1, 1:-1] = False
    lit = torch.tensor(BACKGROUND_LIGHT)[:, None, None] * torch.tensor(list(BACKGROUNDS.values())).float()
    distances = torch.cdist(image[:, edge].T, lit.flatten(0, 1)).view(-1, *lit.shape[:2])
    return list(BACKGROUNDS)[int(distances.amin(dim=1).median(dim=0).values.argmin())]


def coverage(image: Tensor, background: Tensor, colour: Tensor) -> Tensor:
    """Share of the object in each pixel: (32, 32), in [0, 1].

    Args:
        image: (3, 32, 32), float, 0 to 255.
        background: (3,), RGB.
        colour: (3,), RGB, of the object.
    """
    grid = torch.cartesian_prod(
        torch.tensor(SHARES), torch.tensor(BACKGROUND_LIGHT), torch.tensor(OBJECT_LIGHT)
    )
    share, behind, front = grid.T[..., None]
    mixtures = (1 - share) * behind * background + share * front * colour
    distance, nearest = torch.cdist(image.flatten(1).T, mixtures).min(dim=1)
    trust = torch.exp(-0.5 * (distance / TOLERANCE).square())
    return (grid[nearest, 0] * trust).view(IMAGE_PX, IMAGE_PX)


def best_similarity(share: Tensor, shape: str, size: str | None) -> float:
    """Largest Tanimoto similarity <a, m> / (<a, a> + <m, m> - <a, m>) of a coverage with the masks of a shape, over all places.

    Args:
        share: (32, 32), coverage by the object.
        shape: the stated shape.
        size: the stated size; None for one of a pair.

    Returns:
        1 if the coverage is one of the masks, 0 if it is empty.
    """
    spectra, squares = _masks(shape, size)
    overlap = torch.fft.irfft2(torch.fft.rfft2(share, s=(_PADDED, _PADDED)) * spectra, s=(_PADDED, _PADDED))
    similarity = overlap / (share.square().sum() + squares[:, None, None] - overlap)
    return float(similarity.max().clamp(0, 1))


@lru_cache
def _masks(shape: str, size: str | None) -> tuple[Tensor, Tensor]:
    """Conjugate spectra (n, 64, 33) and sums of squares (n,) of a shape's masks."""
    side = IMAGE_PX * SUPERSAMPLING
    y, x = np.mgrid[0:side, 0:side].astype(np.float32) / SUPERSAMPLING + 0.5 / SUPERSAMPLING
    masks = []
    for radius in RADII[size]:
        for rotation in ROTATIONS:
            for dx in OFFSETS:
                for dy in OFFSETS:
                    centre = np.array([IMAGE_PX / 2 + dx, IMAGE_PX / 2 + dy], dtype=np.float32)
                    mask = shape_mask(shape, x, y, centre, radius, rotation).astype(np.float32)
                    masks.append(mask.reshape(IMAGE_PX, SUPERSAMPLING, IMAGE_PX, SUPERSAMPLING).mean((1, 3)))
    stacked = torch.from_numpy(np.stack(masks))
    return torch.fft.rfft2(stacked, s=(_PADDED, _PADDED)).conj(), stacked.square().sum(dim=(1, 2))


def _half(layout: str, number: int) -> Tensor:
    """1 in the half of the first (0) or second (1) object of a pair, 0 in the other."""
    half = torch.zeros(IMAGE_PX, IMAGE_PX)
    middle = IMAGE_PX // 2
    rows = slice(0, middle) if number == 0 else slice(middle, None)
    if layout == "horizontal":
        half[:, rows] = 1
    else:
        half[rows] = 1
    return half
