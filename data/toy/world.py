"""The toy world: captioned 32x32 images whose every stated attribute can be checked.

A scene is a pure function of (split, index): half are single objects ("a small red circle on a gray background"), half are
pairs in a relation ("a red circle above a blue square"). What a caption does not state (exact place, light, shadow, texture,
and the background of a pair) is drawn from the same seed, so the image is a pure function of (split, index) too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

IMAGE_PX = 32
SUPERSAMPLING = 2

SHAPES = ("circle", "square", "triangle", "cross", "ring", "heart")
COLOURS = {
    "red": (222, 44, 38),
    "orange": (244, 140, 28),
    "yellow": (245, 226, 60),
    "green": (48, 168, 62),
    "cyan": (70, 214, 226),
    "blue": (48, 92, 240),
    "pink": (244, 120, 200),
}
BACKGROUNDS = {
    "black": (18, 18, 20),
    "gray": (122, 122, 126),
    "white": (234, 234, 230),
    "brown": (104, 66, 36),
    "navy": (22, 30, 92),
}
SIZES = ("small", "large")
RELATIONS = ("above", "below", "left of", "right of")

Split = Literal["train", "val", "test"]
Style = Literal["textured", "outlined"]
"""Ways of drawing that no caption names: a checked background, or dark contours around the things. The toy base's autoencoder
reproduces both (it makes other colours and finer patterns unreadable)."""
Image = NDArray[np.uint8]
_SPLIT_SEEDS: dict[str, int] = {"train": 11, "val": 12, "test": 13}


@dataclass(frozen=True)
class Thing:
    """One object: its colour and its shape."""

    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{'an' if self.colour == 'orange' else 'a'} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """The content of an image; fields that its caption does not state are None after `parse_caption`.

    A single object has a size and no second thing; a pair has a relation and a second thing.
    """

    first: Thing
    size: str | None = None
    relation: str | None = None
    second: Thing | None = None
    background: str | None = None

    @property
    def layout(self) -> str:
        """`single`, `horizontal` or `vertical`."""
        if self.relation is None:
            return "single"
        return "horizontal" if self.relation in ("left of", "right of") else "vertical"

    def in_place(self) -> tuple[Thing, Thing | None]:
        """The things by position: (left or top one, right or bottom one | None), independent of the caption's order."""
        if self.second is not None and self.relation in ("below", "right of"):
            return self.second, self.first
        return self.first, self.second


def caption_of(scene: Scene) -> str:
    """The caption of a scene."""
    if scene.second is None:
        return f"a {scene.size} {scene.first.colour} {scene.first.shape} on a {scene.background} background"
    return f"{scene.first} {scene.relation} {scene.second}"


def parse_caption(caption: str) -> Scene:
    """The scene that a caption states; the inverse of `caption_of` up to what it does not state.

    Raises:
        ValueError: if the caption is not one of this world.
    """
    words = caption.split()
    scene = _parse_single(words) if words[-1:] == ["background"] else _parse_pair(words)
    if scene is None or caption_of(scene) != caption:
        raise ValueError(
            f"not a caption of the toy world: {caption!r}; it knows 'a small red circle on a gray background' and "
            f"'a red circle above a blue square' with {sorted(COLOURS)}, {list(SHAPES)}, {list(RELATIONS)}"
        )
    return scene


def _parse_single(words: list[str]) -> Scene | None:
    if len(words) != 8 or words[1] not in SIZES or words[6] not in BACKGROUNDS:
        return None
    thing = _parse_thing(words[2:4])
    return Scene(first=thing, size=words[1], background=words[6]) if thing is not None else None


def _parse_pair(words: list[str]) -> Scene | None:
    if len(words) not in (7, 8):
        return None
    first, second, relation = _parse_thing(words[1:3]), _parse_thing(words[-2:]), " ".join(words[3:-3])
    if first is None or second is None or relation not in RELATIONS:
        return None
    return Scene(first=first, relation=relation, second=second)


def _parse_thing(words: list[str]) -> Thing | None:
    colour, shape = words
    return Thing(colour, shape) if colour in COLOURS and shape in SHAPES else None


def _generator(split: Split, index: int, stream: int) -> np.random.Generator:
    if split not in _SPLIT_SEEDS:
        raise ValueError(f"the toy world has the splits {list(get_args(Split))}, not {split!r}")
    return np.random.default_rng((_SPLIT_SEEDS[split], index, stream))


def scene_at(split: Split, index: int) -> Scene:
    """The scene at an index of a split; splits are unlimited."""
    rng = _generator(split, index, stream=0)
    background = _pick(rng, tuple(BACKGROUNDS))
    first = _draw_thing(rng)
    if rng.random() < 0.5:
        return Scene(first=first, size=_pick(rng, SIZES), background=background)
    second = _draw_thing(rng)
    while second == first:
        second = _draw_thing(rng)
    return Scene(first=first, relation=_pick(rng, RELATIONS), second=second, background=background)


def _pick(rng: np.random.Generator, names: tuple[str, ...]) -> str:
    return names[int(rng.integers(len(names)))]


def _draw_thing(rng: np.random.Generator) -> Thing:
    return Thing(_pick(rng, tuple(COLOURS)), _pick(rng, SHAPES))


def captions(split: Split, count: int, start: int = 0) -> list[str]:
    """The captions at indices `start .. start + count` of a split."""
    return [caption_of(scene_at(split, index)) for index in range(start, start + count)]


def image_at(split: Split, index: int, style: Style | None = None) -> Image:
    """The image at an index of a split: (32, 32, 3) uint8 RGB. A style changes how it is drawn, not what is where."""
    return render(scene_at(split, index), _generator(split, index, stream=1), style)


def render(scene: Scene, rng: np.random.Generator, style: Style | None = None) -> Image:
    """Draws a scene; `rng` decides what the caption does not state.

    Returns:
        (32, 32, 3) uint8 RGB, the average of a supersampled drawing.

    Raises:
        ValueError: for an unknown style.
    """
    if style is not None and style not in get_args(Style):
        raise ValueError(f"the toy world has the styles {list(get_args(Style))}, not {style!r}")
    side = IMAGE_PX * SUPERSAMPLING
    y, x = np.mgrid[0:side, 0:side].astype(np.float32) / SUPERSAMPLING + 0.5 / SUPERSAMPLING
    angle = rng.uniform(0, 2 * np.pi)
    light = np.array([np.cos(angle), np.sin(angle)], dtype=np.float32)
    ramp = ((x - IMAGE_PX / 2) * light[0] + (y - IMAGE_PX / 2) * light[1]) / IMAGE_PX
    shade = 1 + rng.uniform(0.0, 0.25) * ramp + _texture(rng, x, y)
    canvas = np.array(BACKGROUNDS[scene.background or "gray"], dtype=np.float32) * shade[..., None]
    if style == "textured":
        checks = np.sin(x * 2 * np.pi / 8) * np.sin(y * 2 * np.pi / 8)
        canvas = canvas + 0.3 * checks[..., None] * (canvas + 40)  # + 40: visible on black too
    for thing, centre, radius in _places(scene, rng):
        rotation = rng.uniform(-0.15, 0.15)
        shadow = shape_mask(thing.shape, x, y, centre - 1.3 * light, radius, rotation)
        canvas = np.where(shadow[..., None], canvas * 0.72, canvas)
        body = shape_mask(thing.shape, x, y, centre, radius, rotation)
        lit = 1 + 0.18 * ((x - centre[0]) * light[0] + (y - centre[1]) * light[1]) / radius
        colour = np.array(COLOURS[thing.colour], dtype=np.float32) * lit[..., None]
        canvas = np.where(body[..., None], colour, canvas)
        if style == "outlined":
            canvas = np.where(_contour(body)[..., None], 0.45 * canvas, canvas)
    pixels = canvas.reshape(IMAGE_PX, SUPERSAMPLING, IMAGE_PX, SUPERSAMPLING, 3).mean(axis=(1, 3))
    image: Image = np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
    return image


def _contour(body: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The points outside a body within a pixel of it."""
    padded, grown = np.pad(body, SUPERSAMPLING), np.zeros_like(body)
    reach = range(2 * SUPERSAMPLING + 1)
    for row in reach:
        for column in reach:
            if (row - SUPERSAMPLING) ** 2 + (column - SUPERSAMPLING) ** 2 <= SUPERSAMPLING**2:
                grown |= padded[row : row + body.shape[0], column : column + body.shape[1]]
    return grown & ~body


def _texture(rng: np.random.Generator, x: NDArray[np.float32], y: NDArray[np.float32]) -> NDArray[np.float32]:
    """Soft stripes of a random direction and wavelength (5 to 10 px), up to 5 % of the brightness."""
    angle, wavelength, phase = rng.uniform(0, np.pi), rng.uniform(5, 10), rng.uniform(0, 2 * np.pi)
    wave = np.sin((np.cos(angle) * x + np.sin(angle) * y) * 2 * np.pi / wavelength + phase)
    texture: NDArray[np.float32] = (rng.uniform(0.0, 0.05) * wave).astype(np.float32)
    return texture


def _places(scene: Scene, rng: np.random.Generator) -> list[tuple[Thing, NDArray[np.float32], float]]:
    """(thing, centre in pixels, radius in pixels) of each object."""
    middle = IMAGE_PX / 2
    if scene.second is None:
        small = scene.size == "small"
        radius = rng.uniform(4.2, 5.4) if small else rng.uniform(8.4, 10.4)
        reach = 6.5 if small else 3.0
        return [(scene.first, middle + rng.uniform(-reach, reach, 2).astype(np.float32), radius)]
    along = np.array([1.0, 0.0] if scene.layout == "horizontal" else [0.0, 1.0], dtype=np.float32)
    across = along[::-1]
    placed = []
    for thing, side in zip(scene.in_place(), (-1.0, 1.0), strict=True):
        assert thing is not None
        offset = side * rng.uniform(7.2, 8.6) * along + rng.uniform(-3.0, 3.0) * across
        placed.append((thing, (middle + offset).astype(np.float32), rng.uniform(5.0, 6.2)))
    return placed


def shape_mask(
    shape: str,
    x: NDArray[np.float32],
    y: NDArray[np.float32],
    centre: NDArray[np.float32],
    radius: float,
    rotation: float,
) -> NDArray[np.bool_]:
    """Which points of the grid the shape covers, rotated by `rotation` radians."""
    dx, dy = (x - centre[0]) / radius, (y - centre[1]) / radius
    u, v = np.cos(rotation) * dx + np.sin(rotation) * dy, np.cos(rotation) * dy - np.sin(rotation) * dx
    narrow, wide, distance = np.minimum(abs(u), abs(v)), np.maximum(abs(u), abs(v)), u * u + v * v
    covered: NDArray[np.bool_]
    if shape == "circle":
        covered = distance <= 1
    elif shape == "square":
        covered = wide <= 0.86
    elif shape == "triangle":
        covered = (v <= 0.8) & (abs(u) <= (v + 1) / 1.8)
    elif shape == "cross":
        covered = (narrow <= 0.34) & (wide <= 1)
    elif shape == "ring":
        covered = (distance <= 1) & (distance >= 0.3)
    elif shape == "heart":
        p, q = 1.2 * u, 0.15 - 1.15 * v
        covered = (p * p + q * q - 1) ** 3 <= p * p * q**3
    else:
        raise ValueError(f"no such shape: {shape!r}; the toy world draws {list(SHAPES)}")
    return covered
