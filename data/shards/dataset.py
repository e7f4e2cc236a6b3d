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
from data.shards.image_condition import ImageCondition
from data.shards.index import ShardSet
from data.shards.order import SampleOrder
from data.shards.tar_headers import BrokenShardError
from sdxs_lightning.batch import TrainingBatch

Content = Literal["latents", "images", "control_images", "noise_seeds", "sizes"]
EmptyCaptions = Literal["refuse", "keep"]

_MEMBERS: dict[str, tuple[str, ...]] = {
    "latents": (LATENT_MEMBER,),
    "images": IMAGE_MEMBERS,
    "control_images": CONTROL_IMAGE_MEMBERS,
    "noise_seeds": (JSON_MEMBER,),
    "sizes": (JSON_MEMBER,),
    "captions": (*CAPTION_MEMBERS, JSON_MEMBER),
}
"""For each content the members that can hold it; the first that a sample has is read."""
_SIZE_FIELDS = ("original_height", "original_width", "crop_top", "crop_left")
"""In the json member: the picture before resizing, as img2dataset names it, and where the crop began; pixels."""
_OPEN_SHARDS = 128


@dataclass(frozen=True)
class _OpenShard:
    """An open file and, as rows of plain numbers, where to read each of its samples.

    A row is the span's start and length, then for each content: where its member begins in the span, its
    size, and the column of its extension. One row costs 0.3 us to look up; the same numbers one by one from
    the index cost five times as much.
    """

    descriptor: int
    rows: NDArray[np.int64]


class ShardDataset(Dataset[TrainingBatch]):
    """Whole batches by position, map-style: `dataset.batch([p0, p1, ...])` is a `TrainingBatch`.

    As a torch Dataset its item is a sequence of positions too, so that a DataLoader without automatic
    batching hands positions to its workers and gets batches back.
    """

    def __init__(
        self,
        shards: ShardSet,
        order: SampleOrder,
        contents: Sequence[Content] = ("latents",),
        resolution: int | None = None,
        empty_captions: EmptyCaptions = "refuse",
        condition: ImageCondition | None = None,
    ) -> None:
        """Check, from the index alone, that every sample has what will be read.

        Args:
            shards: the index.
            order: which sample stands at which position.
            contents: what a batch holds besides captions; nothing reads captions alone.
            resolution: images are resized so that the shorter side has this many pixels, then cropped to a
                centred square; None takes them as they are, all of one size.
            empty_captions: "keep" trains on samples without words, "refuse" stops at the first.
            condition: makes control_images from the picture, as resized and cropped; None reads them as members.

        Raises:
            BadSampleError: naming shard and key, if a sample has no member for a content or for the caption.
            ValueError: on an unknown content.
        """
        unknown = sorted(set(contents) - (set(_MEMBERS) - {"captions"}))
        if unknown:
            raise ValueError(
                f"data.contents is {list(contents)}, but it names latents, images, control_images, noise_seeds "
                "or sizes."
            )
        self.shards = shards
        self.order = order
        self.contents = tuple(contents)
        self.resolution = resolution
        self.empty_captions = empty_captions
        self.condition = condition
        self._first_samples = np.cumsum(shards.sizes) - np.asarray(shards.sizes)
        self._names = shards.names()
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        for number in range(len(shards.shards)):
            self._columns(number)  # raises where a member is missing; kept only for the shards being read

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
        return _collate(self._read_all(self.order.samples_at(positions)), positions)

    def captions(self, count: int) -> list[str]:
        """The captions of the first `count` samples in stored order, or of all if there are fewer."""
        samples = np.arange(min(count, len(self)), dtype=np.int64)
        return [sample["captions"] for sample in self._read_all(samples)]

    def close(self) -> None:
        """Close the shards that are open."""
        for shard in self._open.values():
            os.close(shard.descriptor)
        self._open.clear()

    def __del__(self) -> None:
        """Close the shards that are open."""
        if hasattr(self, "_open"):
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        """Without open files, which another process cannot use."""
        return self.__dict__ | {"_open": OrderedDict()}

    def _read_all(self, samples: NDArray[np.int64]) -> list[dict[str, Any]]:
        """Samples by their number in stored order."""
        # An empty shard begins where the next one does; "right" passes over it.
        numbers = np.searchsorted(self._first_samples, samples, side="right") - 1
        rows = samples - self._first_samples[numbers]
        return [self._read(number, row) for number, row in zip(numbers.tolist(), rows.tolist(), strict=True)]

    def _read(self, number: int, row: int) -> dict[str, Any]:
        index, shard = self.shards.shards[number], self._shard(number)
        start, length, *members = shard.rows[row].tolist()
        # pread rather than a mapping: a file that has shrunk gives a short read, not a bus error.
        # A bytearray, since torch takes no memory that may not be written to.
        span = memoryview(bytearray(os.pread(shard.descriptor, length, start)))
        key = index.key(row)
        if len(span) != length:
            raise BrokenShardError(
                f"{index.path} ends at byte {os.fstat(shard.descriptor).st_size}, before its sample '{key}' "
                "does: it changed while it was being read; write or copy it again."
            )
        where = f"{index.path}, key '{key}'"
        sample: dict[str, Any] = {"id": f"{self._names[number]}/{key}"}
        for content, begin, size, column in zip(
            ("captions", *self.contents), members[::3], members[1::3], members[2::3], strict=True
        ):
            self._decode(sample, content, index.extensions[column], span[begin : begin + size], where)
        return sample

    def _columns(self, number: int) -> list[NDArray[np.int64]]:
        """For the caption and each content the column of its member, (samples,)."""
        index = self.shards.shards[number]
        columns = []
        for content in ("captions", *self.contents):
            column = np.full(len(index), -1, dtype=np.int64)
            made = content == "control_images" and self.condition is not None
            for extension in reversed(_MEMBERS["images" if made else content]):
                if (found := index.column(extension)) is not None:
                    column[index.offsets[:, found] >= 0] = found
            if (column < 0).any():
                first = int(np.flatnonzero(column < 0)[0])
                what = "caption" if content == "captions" else f"member for '{content}'"
                raise BadSampleError(
                    f"{index.path}, key '{index.key(first)}': there is no {what} "
                    f"({', '.join(_MEMBERS[content])}) in this sample and in {int((column < 0).sum()) - 1} "
                    "more of this shard; write them, or change data.contents."
                )
            columns.append(column)
        return columns

    def _shard(self, number: int) -> _OpenShard:
        if (shard := self._open.get(number)) is None:
            index, columns = self.shards.shards[number], np.stack(self._columns(number))
            every = np.arange(len(index))
            offsets, sizes = index.offsets[every, columns], index.sizes[every, columns]
            starts = offsets.min(axis=0)
            lengths = (offsets + sizes).max(axis=0) - starts
            per_content = np.stack([offsets - starts, sizes, columns], axis=-1)  # (contents, samples, 3)
            rows = np.column_stack([starts, lengths, *per_content])
            shard = _OpenShard(os.open(index.path, os.O_RDONLY), rows)
            if len(self._open) >= _OPEN_SHARDS:
                os.close(self._open.popitem(last=False)[1].descriptor)
            self._open[number] = shard
        else:
            self._open.move_to_end(number)
        return shard

    def _decode(
        self, sample: dict[str, Any], content: str, extension: str, part: memoryview, where: str
    ) -> None:
        if content == "captions":
            sample[content] = self._caption(decode(extension, part, where), where)
        elif content == "noise_seeds":
            sample[content] = _field(decode(extension, part, where), "noise_seed", int, where)
        elif content == "sizes":
            fields = decode(extension, part, where)
            height, width, top, left = (_field(fields, name, int, where) for name in _SIZE_FIELDS)
            sample["original_size"], sample["crop"] = (height, width), (top, left)
        elif content == "latents":
            sample[content] = decode(extension, part, where)
        else:
            pixels, original_size, crop = _fit(decode_image(part, where), self.resolution)
            if content == "control_images" and self.condition is not None:
                pixels = _conditioned(self.condition, pixels, where)
            sample[content] = pixels
            if content == "images":
                sample["original_size"], sample["crop"] = original_size, crop

    def _caption(self, decoded: str | dict[str, Any], where: str) -> str:
        caption = decoded if isinstance(decoded, str) else str(_field(decoded, "caption", str, where)).strip()
        if not caption and self.empty_captions == "refuse":
            raise BadSampleError(
                f"{where}: the caption is empty; set data.empty_captions to 'keep' to train on samples "
                "without words."
            )
        return caption


def _conditioned(condition: ImageCondition, pixels: NDArray[np.uint8], where: str) -> NDArray[np.uint8]:
    made = condition(pixels)
    if made.dtype != np.uint8 or made.shape != pixels.shape:
        raise ValueError(
            f"{where}: data.condition made {made.dtype} {made.shape} of a picture of {pixels.shape}, but a condition "
            "image is uint8 of the picture's shape."
        )
    return np.ascontiguousarray(made)  # torch takes no array of negative strides


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
        return np.array(image), original, (0, 0)
    scale = resolution / min(image.size)
    width, height = max(resolution, round(image.width * scale)), max(resolution, round(image.height * scale))
    left, top = (width - resolution) // 2, (height - resolution) // 2
    resized = image.resize((width, height), Image.Resampling.LANCZOS)
    return np.array(resized.crop((left, top, left + resolution, top + resolution))), original, (top, left)


def _collate(samples: list[dict[str, Any]], positions: Sequence[int]) -> TrainingBatch:
    images, control = _stack(samples, "images"), _stack(samples, "control_images")
    latents = _stack(samples, "latents", torch.float32)
    has_sizes = "original_size" in samples[0]
    return TrainingBatch(
        captions=[sample["captions"] for sample in samples],
        positions=torch.as_tensor(positions, dtype=torch.int64),
        sample_ids=[sample["id"] for sample in samples],
        latents=latents,
        images=None if images is None else images.permute(0, 3, 1, 2).float().div_(127.5).sub_(1),
        pair_noise_seeds=torch.tensor([s["noise_seeds"] for s in samples])
        if "noise_seeds" in samples[0]
        else None,
        original_sizes=torch.tensor([sample["original_size"] for sample in samples]) if has_sizes else None,
        crops=torch.tensor([sample["crop"] for sample in samples]) if has_sizes else None,
        control_images=None if control is None else control.permute(0, 3, 1, 2).float().div_(255),
    )


def _stack(samples: list[dict[str, Any]], content: str, dtype: torch.dtype = torch.uint8) -> Tensor | None:
    if content not in samples[0]:
        return None
    shape = samples[0][content].shape
    for sample in samples:
        if sample[content].shape != shape:
            raise BadSampleError(
                f"One batch holds {content} of one size, but {samples[0]['id']} has {shape} and {sample['id']} has "
                f"{sample[content].shape}; set data.resolution, or write shards of one size."
            )
    # Written where it stays: stacking first and converting then takes five times as long for latents of SDXL.
    stacked = torch.empty((len(samples), *shape), dtype=dtype)
    for row, sample in zip(stacked, samples, strict=True):
        row.copy_(torch.from_numpy(sample[content]))
    return stacked
