"""The webdataset package on the same files, as its documentation says to use it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import webdataset
from torch import Tensor
from torchvision.transforms import v2


def raw_samples(folder: Path) -> Iterator[dict[str, Any]]:
    """Undecoded samples, one pass in the written order: its fastest way."""
    yield from webdataset.WebDataset(_urls(folder), shardshuffle=False)


def image_batches(folder: Path, side_px: int, batch_size: int, workers: int) -> Iterator[tuple[Tensor, Any]]:
    """Pictures as float tensors in [-1, 1] with captions, decoded by PIL, resized and cropped by torchvision."""
    transform = v2.Compose(
        [
            v2.Resize(side_px, interpolation=v2.InterpolationMode.BICUBIC),
            v2.CenterCrop(side_px),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )
    dataset = (
        webdataset.WebDataset(_urls(folder), shardshuffle=False, nodesplitter=None)
        .shuffle(100)
        .decode("pilrgb", handler=webdataset.handlers.reraise_exception)
        .to_tuple("jpg", "txt")
        .map_tuple(transform, lambda text: text)
        .batched(batch_size, partial=False)
    )
    yield from webdataset.WebLoader(dataset, batch_size=None, num_workers=workers)


def _urls(folder: Path) -> list[str]:
    return [str(path) for path in sorted(folder.glob("*.tar"))]
