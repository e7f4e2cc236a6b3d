"""Collates samples to a batch."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.shards.decoders import BadSampleError
from sdxs_lightning.core.batch import TrainingBatch


def collate(samples: Sequence[dict[str, Any]], positions: Sequence[int]) -> TrainingBatch:
    """Stack samples of `ShardDataset` into a batch.

    Raises:
        BadSampleError: naming two samples, if sizes differ.
    """
    images, control = _pixels(samples, "images"), _pixels(samples, "control_images")
    has_sizes = "original_size" in samples[0]
    return TrainingBatch(
        captions=[sample["captions"] for sample in samples],
        positions=torch.as_tensor(positions, dtype=torch.int64),
        sample_ids=[sample["id"] for sample in samples],
        latents=_stack(samples, "latents"),
        images=None if images is None else images.div_(127.5).sub_(1),
        pair_noise_seeds=torch.tensor([s["noise_seeds"] for s in samples])
        if "noise_seeds" in samples[0]
        else None,
        original_sizes=torch.tensor([sample["original_size"] for sample in samples]) if has_sizes else None,
        crops=torch.tensor([sample["crop"] for sample in samples]) if has_sizes else None,
        control_images=None if control is None else control.div_(255),
    )


def _stack(samples: Sequence[dict[str, Any]], content: str) -> Tensor | None:
    """(B, ...) float32."""
    if content not in samples[0]:
        return None
    _require_one_shape(samples, content)
    # Converted in place: stacking before converting takes five times as long for SDXL latents.
    stacked = torch.empty((len(samples), *samples[0][content].shape))
    for row, sample in zip(stacked, samples, strict=True):
        row.copy_(torch.from_numpy(sample[content]))
    return stacked


def _pixels(samples: Sequence[dict[str, Any]], content: str) -> Tensor | None:
    """(B, 3, H, W) float32, 0 to 255. Contiguous: checking a permuted view for NaN takes longer than decoding it.

    Condition images of 16 bits are brought to the same range, with their precision.
    """
    if content not in samples[0]:
        return None
    _require_one_shape(samples, content)
    height, width, channels = samples[0][content].shape
    stacked = torch.empty((len(samples), channels, height, width))
    for row, sample in zip(stacked, samples, strict=True):
        row.copy_(torch.from_numpy(sample[content]).permute(2, 0, 1))
        if sample[content].dtype == np.uint16:
            row.div_(257)
    return stacked


def _require_one_shape(samples: Sequence[dict[str, Any]], content: str) -> None:
    shape = samples[0][content].shape
    for sample in samples:
        if sample[content].shape != shape:
            raise BadSampleError(
                f"One batch holds {content} of one size, but {samples[0]['id']} has {shape} and {sample['id']} has "
                f"{sample[content].shape}; set data.resolution or data.buckets, or write shards of one size."
            )
