"""Images of the toy world in memory: the data of its own small networks (autoencoder, CLIP, classifier, text encoders)."""

from __future__ import annotations

from typing import NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.toy.world import Split, captions, image_at

_RENDER_BATCH = 250


class CaptionedImages(NamedTuple):
    """A batch of images, (B,3,32,32) uint8, and their B captions."""

    images_uint8: Tensor
    captions: list[str]


def render_batch(split: Split, count: int, start: int = 0) -> Tensor:
    """The images at indices `start .. start + count` of a split: (count, 3, 32, 32) uint8."""
    frames = np.stack([image_at(split, index) for index in range(start, start + count)])
    return torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous()


class RenderedSplit(Dataset[int]):
    """The first `count` images of a split, rendered once; items are indices, `collate` makes the batch."""

    def __init__(self, split: Split, count: int) -> None:
        starts = track(range(0, count, _RENDER_BATCH), description=f"rendering {split}")
        self.images_uint8 = torch.cat([render_batch(split, min(_RENDER_BATCH, count - i), i) for i in starts])
        self.captions = captions(split, count)

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> int:
        return index

    def collate(self, indices: list[int]) -> CaptionedImages:
        """Indexes a complete batch at once, which is cheaper than stacking single items."""
        return CaptionedImages(self.images_uint8[indices], [self.captions[index] for index in indices])


class RenderedWorld(pl.LightningDataModule):
    """DataModule of rendered images of the toy world.

    Args:
        train_images: number of images of the train split.
        val_images: number of images of the val split.
        batch_size: images per batch.
    """

    def __init__(self, train_images: int = 24000, val_images: int = 1000, batch_size: int = 64) -> None:
        super().__init__()
        self.train_images, self.val_images, self.batch_size = train_images, val_images, batch_size

    def setup(self, stage: str) -> None:
        self.train_split = RenderedSplit("train", self.train_images)
        self.val_split = RenderedSplit("val", self.val_images)

    def train_dataloader(self) -> DataLoader[int]:
        """Shuffled by torch's global seed (`seed_everything`)."""
        data = self.train_split
        return DataLoader(data, self.batch_size, shuffle=True, drop_last=True, collate_fn=data.collate)

    def val_dataloader(self) -> DataLoader[int]:
        return DataLoader(self.val_split, self.batch_size, collate_fn=self.val_split.collate)
