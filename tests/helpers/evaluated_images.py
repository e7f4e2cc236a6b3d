"""Images, captions and the command that measures them, for the tests of right numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from evaluation.networks.frozen_clip import FrozenClip
from tests.helpers.metric_networks import random_images

WORDS = [
    f"a {colour} {shape}"
    for colour in ("red", "blue", "green", "pink")
    for shape in ("circle", "square", "ring")
]
COUNT = len(WORDS)
CPU = torch.device("cpu")

Run = Callable[..., dict[str, Any]]
Refused = Callable[..., str]


def write_images(folder: Path, names: Sequence[str], seed: int = 0, size: int = 40) -> Path:
    """Writes a random image for each name."""
    for name, image in zip(names, random_images(len(names), seed, size), strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / name)
    return folder


def captions(path: Path, lines: Sequence[str]) -> Path:
    """Writes a list of captions, one a line."""
    path.write_text("\n".join(lines) + "\n")
    return path


def direct_clip_score(world: Path, folder: Path, names: Sequence[str], texts: Sequence[str]) -> float:
    """The CLIP score of the images, each against its text, without the command."""
    clip = FrozenClip(world / "clip")
    frames = [np.asarray(Image.open(folder / name).convert("RGB")) for name in names]
    stacked = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)
    return float(100 * clip.cosine(stacked, texts).double().mean())
