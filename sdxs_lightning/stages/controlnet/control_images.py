"""The condition images of a micro-batch: checked, extracted from images, dropped."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sdxs_lightning.core.batch import TrainingBatch
from sdxs_lightning.core.image_condition import ImageCondition
from sdxs_lightning.core.latents import to_uint8
from sdxs_lightning.core.seeding import Stream, uniform
from sdxs_lightning.families import Family


def control_images_of(batch: TrainingBatch, family: Family, channels: int) -> Tensor:
    """The batch's condition images (B, C, H, W), float32, in [0, 1].

    Args:
        batch: of the data.
        family: says how many pixels a latent has.
        channels: C, as the ControlNet or reader takes it.

    Raises:
        ValueError: if the batch has none, or some of another size than the base's images, or of other channels.
    """
    found, latents = batch.control_images, batch.latents
    if found is None:
        raise ValueError(
            "this stage needs condition images, and the batch has none: let data.contents name control_images, and the shards "
            "hold cond.png (`python -m data.prepare images --condition ...`), or set data.condition."
        )
    if found.shape[1] != channels:
        raise ValueError(
            f"the batch's condition images have {found.shape[1]} channels, and {channels} are expected; change "
            "conditioning_channels of the ControlNet (channels of a reader)."
        )
    factor = family.resolution // family.latent_shape()[1]
    side = family.latent_shape()[1:] if latents is None else tuple(latents.shape[-2:])
    wanted = factor * side[0], factor * side[1]
    if tuple(found.shape[-2:]) != wanted:
        raise ValueError(
            f"the batch's condition images have {found.shape[-2]}x{found.shape[-1]} pixels and its images "
            f"{wanted[0]}x{wanted[1]}; set data.resolution to {family.resolution}, or prepare the shards at one resolution."
        )
    return found.float()


def extracted(condition: ImageCondition, images: Tensor) -> Tensor:
    """The condition images (B, 3, H, W), uint8, of images (B, 3, H, W) in [-1, 1]; computed on the CPU."""
    frames = to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()
    made = np.stack([condition(np.ascontiguousarray(frame)) for frame in frames])
    return torch.from_numpy(made).permute(0, 3, 1, 2).to(images.device)


def check_dropout(option: str, share: float) -> None:
    """Raises ValueError for a share of dropped condition images with which none would be left, or that is none."""
    if not 0 <= share < 1:
        raise ValueError(
            f"{option} is a share in [0, 1), got {share}; at 1 the ControlNet would never see a condition."
        )


def with_some_dropped(control_images: Tensor, share: float, seed: int, positions: Tensor) -> Tensor:
    """Makes a share of the condition images black, drawn by seed and position."""
    if share == 0:
        return control_images
    kept = uniform(seed, Stream.CONDITION_DROPOUT, positions) >= share
    return control_images * kept[:, None, None, None]
