"""Images of the toy world in memory: the data of its own small networks (autoencoder, CLIP, classifier, text encoders)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.toy.world import Split, Style, captions, image_at, parse_caption, render

_RENDER_BATCH = 250


class CaptionedImages(NamedTuple):
    """A batch of images, (B,3,32,32) uint8, and their B captions."""

    images_uint8: Tensor
    captions: list[str]
    styles: Tensor
    """(B,) int64: index into the DataModule's `styles`."""


def render_batch(
    split: Split, count: int, start: int = 0, styles: Sequence[Style | None] = (None,)
) -> Tensor:
    """The images at indices `start .. start + count` of a split, in turn in each of the styles: (count, 3, 32, 32) uint8."""
    frames = np.stack(
        [image_at(split, index, styles[index % len(styles)]) for index in range(start, start + count)]
    )
    return torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous()


def render_captions(prompts: Sequence[str], ids: Tensor, style: Style | None = None) -> Tensor:
    """An image of each caption: (B, 3, 32, 32) uint8.

    Args:
        prompts: B captions of the world.
        ids: (B,), int64; an id decides what its caption leaves open.
        style: how it is drawn.
    """
    drawn = [
        render(parse_caption(prompt), np.random.default_rng(number), style)
        for prompt, number in zip(prompts, ids.tolist(), strict=True)
    ]
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).contiguous()


class RenderedSplit(Dataset[int]):
    """The first `count` images of a split, rendered once; items are indices, `collate` makes the batch."""

    def __init__(self, split: Split, count: int, styles: Sequence[Style | None] = (None,)) -> None:
        starts = track(range(0, count, _RENDER_BATCH), description=f"rendering {split}")
        self.images_uint8 = torch.cat(
            [render_batch(split, min(_RENDER_BATCH, count - i), i, styles) for i in starts]
        )
        self.captions = captions(split, count)
        self.styles = torch.arange(count) % len(styles)

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> int:
        return index

    def collate(self, indices: list[int]) -> CaptionedImages:
        """Indexes a complete batch at once, which is cheaper than stacking single items."""
        chosen = [self.captions[index] for index in indices]
        return CaptionedImages(self.images_uint8[indices], chosen, self.styles[indices])


class RenderedWorld(pl.LightningDataModule):
    """DataModule of rendered images of the toy world.

    Args:
        train_images: number of images of the train split.
        val_images: number of images of the val split.
        batch_size: images per batch.
        styles: the images are drawn in turn in each of them; null is the plain drawing.
    """

    def __init__(
        self,
        train_images: int = 24000,
        val_images: int = 1000,
        batch_size: int = 64,
        styles: list[Style | None] | None = None,
    ) -> None:
        super().__init__()
        self.styles: list[Style | None] = styles or [None]
        self.train_images, self.val_images, self.batch_size = train_images, val_images, batch_size

    def setup(self, stage: str) -> None:
        self.train_split = RenderedSplit("train", self.train_images, self.styles)
        self.val_split = RenderedSplit("val", self.val_images, self.styles)

    def train_dataloader(self) -> DataLoader[int]:
        """Shuffled by torch's global seed (`seed_everything`)."""
        data = self.train_split
        return DataLoader(data, self.batch_size, shuffle=True, drop_last=True, collate_fn=data.collate)

    def val_dataloader(self) -> DataLoader[int]:
        return DataLoader(self.val_split, self.batch_size, collate_fn=self.val_split.collate)
