"""Reading samples by position: one pread spans the members of a sample, then each is decoded."""

import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from data.shards.decoders import (
    CAPTION_MEMBERS,
    CONTROL_IMAGE_MEMBERS,
    IMAGE_MEMBERS,
    JSON_MEMBER,
    LATENT_MEMBER,
    BadSampleError,
    decode,
    decode_image,
)
from data.shards.index import ShardSet
from data.shards.order import SampleOrder
from data.shards.tar_headers import BrokenShardError
from sdxs_lightning.batch import TrainingBatch

Content = Literal["latents", "images", "control_images", "noise_seeds"]
EmptyCaptions = Literal["refuse", "keep"]

_MEMBERS: dict[str, tuple[str, ...]] = {
    "latents": (LATENT_MEMBER,),
    "images": IMAGE_MEMBERS,
    "control_images": CONTROL_IMAGE_MEMBERS,
    "noise_seeds": (JSON_MEMBER,),
    "captions": (*CAPTION_MEMBERS, JSON_MEMBER),
}
"""For each content the members that can hold it; the first that a sample has is read."""
_OPEN_SHARDS = 128


@dataclass(frozen=True)
class _Plan:
    """How to read the samples of one shard: per content the column of its member, (samples,), and one span a sample."""

    columns: dict[str, NDArray[np.int64]]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]


class ShardDataset(Dataset[TrainingBatch]):
    """Whole batches by position, map-style: `dataset.batch([p0, p1, ...])` is a `TrainingBatch`.

    As a torch Dataset its item is a sequence of positions too, so that a DataLoader without automatic batching hands
    positions to its workers and gets batches back.
    """

    def __init__(
        self,
        shards: ShardSet,
        order: SampleOrder,
        contents: Sequence[Content] = ("latents",),
        resolution: int | None = None,
        empty_captions: EmptyCaptions = "refuse",
    ) -> None:
        """Check, from the index alone, that every sample has what will be read.

        Args:
            shards: the index.
            order: which sample stands at which position.
            contents: what a batch holds besides captions.
            resolution: images are resized so that the shorter side has this many pixels, then cropped to a centred square;
                None takes them as they are, all of one size.
            empty_captions: "keep" trains on samples without words, "refuse" stops at the first.

        Raises:
            BadSampleError: naming shard and key, if a sample has no member for a content or for the caption.
            ValueError: on an unknown content, or none.
        """
        unknown = sorted(set(contents) - (set(_MEMBERS) - {"captions"}))
        if unknown or not contents:
            raise ValueError(
                f"data.contents is {list(contents)}, but it names one or more of latents, images, control_images, noise_seeds."
            )
        self.shards = shards
        self.order = order
        self.contents = tuple(contents)
        self.resolution = resolution
        self.empty_captions = empty_captions
        self._ends = np.cumsum(shards.sizes)
        self._names = shards.names()
        self._plans = [self._plan(number) for number in range(len(shards.shards))]
        self._files: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        """Samples in an epoch."""
        return len(self.order)

    def __getitem__(self, positions: Sequence[int]) -> TrainingBatch:
        """As `batch`."""
        return self.batch(positions)

    def batch(self, positions: Sequence[int]) -> TrainingBatch:
        """The samples at these positions.

        Raises:
            BadSampleError: if a member cannot be decoded, a caption is empty and may not be, or sizes differ.
            BrokenShardError: if a shard has become shorter than its index says.
        """
        samples = self.order.samples_at(positions)
        numbers = np.searchsorted(self._ends, samples, side="right")
        rows = samples - self._ends[numbers] + np.asarray(self.shards.sizes)[numbers]
        read = [self._read(number, row) for number, row in zip(numbers.tolist(), rows.tolist(), strict=True)]
        return _collate(read, positions)

    def sample_id(self, number: int, row: int) -> str:
        """`<shard>/<key>`, unique within the data set."""
        return f"{self._names[number]}/{self.shards.shards[number].key(row)}"

    def close(self) -> None:
        """Close the shards that are open."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def __del__(self) -> None:
        """Close the shards that are open."""
        if hasattr(self, "_files"):
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        """Without open files, which another process cannot use."""
        return self.__dict__ | {"_files": OrderedDict()}

    def _plan(self, number: int) -> _Plan:
        index = self.shards.shards[number]
        columns = {}
        for content in ("captions", *self.contents):
            column = np.full(len(index), -1, dtype=np.int64)
            for extension in reversed(_MEMBERS[content]):
                found = index.column(extension)
                if found is not None:
                    column[index.offsets[:, found] >= 0] = found
            if (column < 0).any():
                first = int(np.flatnonzero(column < 0)[0])
                what = "caption" if content == "captions" else f"member for '{content}'"
                raise BadSampleError(
                    f"{index.path}, key '{index.key(first)}': there is no {what} ({', '.join(_MEMBERS[content])}) in this sample "
                    f"and in {int((column < 0).sum()) - 1} more of this shard; write them, or change data.contents."
                )
            columns[content] = column
        every, rows = np.stack(list(columns.values())), np.arange(len(index))
        offsets = index.offsets[rows, every]
        return _Plan(columns, offsets.min(axis=0), (offsets + index.sizes[rows, every]).max(axis=0))

    def _read(self, number: int, row: int) -> dict[str, Any]:
        index, plan = self.shards.shards[number], self._plans[number]
        start, end = int(plan.starts[row]), int(plan.ends[row])
        # pread rather than a mapping: a file that has shrunk gives a short read, not a bus error.
        span = os.pread(self._descriptor(number), end - start, start)
        if len(span) != end - start:
            raise BrokenShardError(
                f"{index.path} ends at byte {start + len(span)}, before its sample '{index.key(row)}' does: it changed while it "
                "was being read; write or copy it again."
            )
        sample: dict[str, Any] = {"id": self.sample_id(number, row)}
        for content, column in plan.columns.items():
            member = int(column[row])
            begin = int(index.offsets[row, member]) - start
            part = span[begin : begin + int(index.sizes[row, member])]
            self._decode(
                sample, content, index.extensions[member], part, f"{index.path}, key '{index.key(row)}'"
            )
        return sample

    def _decode(self, sample: dict[str, Any], content: str, extension: str, part: bytes, where: str) -> None:
        if content == "captions":
            sample[content] = self._caption(decode(extension, part, where), where)
        elif content == "noise_seeds":
            sample[content] = _field(decode(extension, part, where), "noise_seed", int, where)
        elif content == "latents":
            sample[content] = decode(extension, part, where)
        else:
            pixels, original_size, crop = _fit(decode_image(part, where), self.resolution)
            sample[content] = pixels
            if content == "images":
                sample["original_size"], sample["crop"] = original_size, crop

    def _caption(self, decoded: str | dict[str, Any], where: str) -> str:
        caption = decoded if isinstance(decoded, str) else str(_field(decoded, "caption", str, where)).strip()
        if not caption and self.empty_captions == "refuse":
            raise BadSampleError(
                f"{where}: the caption is empty; set data.empty_captions to 'keep' to train on samples without words."
            )
        return caption

    def _descriptor(self, number: int) -> int:
        if (descriptor := self._files.get(number)) is None:
            descriptor = os.open(self.shards.shards[number].path, os.O_RDONLY)
            if len(self._files) >= _OPEN_SHARDS:
                os.close(self._files.popitem(last=False)[1])
            self._files[number] = descriptor
        else:
            self._files.move_to_end(number)
        return descriptor


def _field(decoded: dict[str, Any], name: str, kind: type, where: str) -> Any:
    if not isinstance(decoded.get(name), kind):
        raise BadSampleError(f"{where}: the json member has no {kind.__name__} named '{name}'.")
    return decoded[name]


def _fit(
    image: Image.Image, resolution: int | None
) -> tuple[NDArray[np.uint8], tuple[int, int], tuple[int, int]]:
    """The image as (H, W, 3), its height and width before, and top and left of the crop after resizing."""
    original = (image.height, image.width)
    if resolution is None or original == (resolution, resolution):
        return np.asarray(image), original, (0, 0)
    scale = resolution / min(image.size)
    width, height = max(resolution, round(image.width * scale)), max(resolution, round(image.height * scale))
    left, top = (width - resolution) // 2, (height - resolution) // 2
    resized = image.resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(resized.crop((left, top, left + resolution, top + resolution))), original, (top, left)


def _collate(samples: list[dict[str, Any]], positions: Sequence[int]) -> TrainingBatch:
    images, control = _stack(samples, "images"), _stack(samples, "control_images")
    latents = _stack(samples, "latents")
    has_images = images is not None
    return TrainingBatch(
        captions=[sample["captions"] for sample in samples],
        positions=torch.as_tensor(positions, dtype=torch.int64),
        sample_ids=[sample["id"] for sample in samples],
        latents=None if latents is None else latents.float(),
        images=None if images is None else images.permute(0, 3, 1, 2).float().div_(127.5).sub_(1),
        pair_noise_seeds=torch.tensor([s["noise_seeds"] for s in samples])
        if "noise_seeds" in samples[0]
        else None,
        original_sizes=torch.tensor([sample["original_size"] for sample in samples]) if has_images else None,
        crops=torch.tensor([sample["crop"] for sample in samples]) if has_images else None,
        control_images=None if control is None else control.permute(0, 3, 1, 2).float().div_(255),
    )


def _stack(samples: list[dict[str, Any]], content: str) -> Tensor | None:
    if content not in samples[0]:
        return None
    shapes = {sample[content].shape: sample["id"] for sample in samples}
    if len(shapes) > 1:
        (first, first_id), (other, other_id) = list(shapes.items())[:2]
        raise BadSampleError(
            f"One batch holds {content} of one size, but {first_id} has {first} and {other_id} has {other}; "
            "set data.resolution, or write shards of one size."
        )
    return torch.from_numpy(np.stack([sample[content] for sample in samples]))
