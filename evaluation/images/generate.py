"""Image makers; each image is a function of its caption and its number alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from data.toy.world import Split, image_at
from sdxs_lightning.core.batch import Conditioning
from sdxs_lightning.core.latents import from_uint8, to_uint8
from sdxs_lightning.core.seeding import Stream, normal
from sdxs_lightning.families import Family

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


class ImageMaker(Protocol):
    """Makes images: a student, a sampler, an exported pipeline, the renderer."""

    def __call__(self, captions: Sequence[str], sample_ids: Tensor) -> Tensor:
        """(B,3,H,W) uint8 images for B captions and their sample ids (B,) int64."""


@dataclass(frozen=True)
class SampledImages:
    """Images of a latent sampler: seeded noise -> latents -> the family's decoder -> uint8.

    The noise of sample i is seeded by (seed, i), so it does not depend on the batch, the number of ranks or the number of
    samples; a student and its teacher start from the same noise.
    """

    sampler: Callable[[Tensor, Conditioning], Tensor]
    """Maps (noise, conditioning) to latents: a student, an EMA student or a TargetSampler."""
    family: Family
    """Encodes the prompts, decodes the latents."""
    device: torch.device
    """Device of the images."""
    seed: int = 0
    """Seed of the noise."""

    def __call__(self, captions: Sequence[str], sample_ids: Tensor) -> Tensor:
        with torch.no_grad():
            noise = normal(
                self.seed, Stream.EVALUATION, sample_ids.to(self.device), self.family.latent_shape()
            )
            latents = self.sampler(noise, self.family.encode_prompts(list(captions)))
            return to_uint8(self.family.decode(latents))


@dataclass(frozen=True)
class RealImages:
    """Real images of the toy world, with the captions of the same split."""

    split: Split
    """Split of the toy world."""
    device: torch.device = torch.device("cpu")
    """Device of the images."""

    def __call__(self, captions: Sequence[str], sample_ids: Tensor) -> Tensor:
        frames = np.stack([image_at(self.split, index) for index in sample_ids.tolist()])
        return torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous().to(self.device)


@dataclass(frozen=True)
class Reconstructions:
    """Real images encoded and decoded by the autoencoder, which bounds the quality of samplers that use its decoder."""

    real: RealImages
    """Images to reconstruct."""
    vae: AutoencoderKL
    """Autoencoder, on the same device."""

    def __call__(self, captions: Sequence[str], sample_ids: Tensor) -> Tensor:
        images = from_uint8(self.real(captions, sample_ids))
        with torch.no_grad():
            return to_uint8(self.vae.decode(self.vae.encode(images).latent_dist.mode()).sample)


def rank_batches(
    count: int, batch_size: int, rank: int = 0, world_size: int = 1
) -> Iterator[tuple[Tensor, int]]:
    """This rank's share of samples 0 .. count - 1, in batches.

    All ranks get the same number of non-empty batches, because the forward of a sharded network is collective; short batches
    are padded with the last sample.

    Yields:
        sample ids (B,) int64, and the number of them that are not padding.
    """
    own = torch.arange(count)[rank::world_size]
    longest = -(-count // world_size)
    for start in range(0, longest, batch_size):
        size = min(batch_size, longest - start)
        batch = own[start : start + size]
        padding = torch.full((size - len(batch),), count - 1)
        yield torch.cat([batch, padding]), len(batch)
