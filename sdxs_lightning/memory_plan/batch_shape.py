"""The micro-batch of the planned step."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sdxs_lightning.core.batch import TrainingBatch
from sdxs_lightning.memory_plan.weightless import META


@dataclass(frozen=True)
class BatchShape:
    """What a micro-batch holds, and how many of them share gradients."""

    latents: tuple[int, int, int] | None
    """(C, h, w); None: the data yields images and no latents."""
    images: int | None = None
    """Side in pixels; None: the data yields no images."""
    accumulate: int = 1
    """Micro-batches whose gradients are averaged; from 2 on, gradients outlive a micro-batch."""

    def make(self, size: int) -> TrainingBatch:
        """A batch of that size on the meta device."""
        latents = None if self.latents is None else torch.empty(size, *self.latents, device=META)
        images = None if self.images is None else torch.empty(size, 3, self.images, self.images, device=META)
        return TrainingBatch(
            captions=[""] * size,
            positions=torch.empty(size, dtype=torch.int64, device=META),
            sample_ids=[str(i) for i in range(size)],
            latents=latents,
            images=images,
            pair_noise_seeds=torch.empty(size, dtype=torch.int64, device=META),
            original_sizes=torch.empty(size, 2, dtype=torch.int64, device=META),
            crops=torch.empty(size, 2, dtype=torch.int64, device=META),
        )
