"""From samples to a batch."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from data.shards.decoders import BadSampleError
from sdxs_lightning.batch import TrainingBatch


def collate(samples: Sequence[dict[str, Any]], positions: Sequence[int]) -> TrainingBatch:
    """One batch of samples as `ShardDataset` reads them.

    Raises:
        BadSampleError: naming two samples, if sizes differ.
    """
    images, control = _stack(samples, "images"), _stack(samples, "control_images")
    has_sizes = "original_size" in samples[0]
    return TrainingBatch(
        captions=[sample["captions"] for sample in samples],
        positions=torch.as_tensor(positions, dtype=torch.int64),
        sample_ids=[sample["id"] for sample in samples],
        latents=_stack(samples, "latents", torch.float32),
        images=None if images is None else images.permute(0, 3, 1, 2).float().div_(127.5).sub_(1),
        pair_noise_seeds=torch.tensor([s["noise_seeds"] for s in samples])
        if "noise_seeds" in samples[0]
        else None,
        original_sizes=torch.tensor([sample["original_size"] for sample in samples]) if has_sizes else None,
        crops=torch.tensor([sample["crop"] for sample in samples]) if has_sizes else None,
        control_images=None if control is None else control.permute(0, 3, 1, 2).float().div_(255),
    )


def _stack(
    samples: Sequence[dict[str, Any]], content: str, dtype: torch.dtype = torch.uint8
) -> Tensor | None:
    if content not in samples[0]:
        return None
    shape = samples[0][content].shape
    for sample in samples:
        if sample[content].shape != shape:
            raise BadSampleError(
                f"One batch holds {content} of one size, but {samples[0]['id']} has {shape} and {sample['id']} has "
                f"{sample[content].shape}; set data.resolution or data.buckets, or write shards of one size."
            )
    # Written where it stays: stacking first and converting then takes five times as long for latents of SDXL.
    stacked = torch.empty((len(samples), *shape), dtype=dtype)
    for row, sample in zip(stacked, samples, strict=True):
        row.copy_(torch.from_numpy(sample[content]))
    return stacked
