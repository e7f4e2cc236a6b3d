"""Names and shapes of a U-Net's tensors, without memory for their values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from sdxs_lightning.surgery.anatomy import full_config


def meta_unet(config: Mapping[str, Any]) -> UNet2DConditionModel:
    """A U-Net on the meta device."""
    with torch.device("meta"):
        return UNet2DConditionModel(**full_config(config))


def shapes_of(config: Mapping[str, Any]) -> dict[str, torch.Size]:
    """The shape of every tensor in the `state_dict()` of a U-Net."""
    return {name: tensor.shape for name, tensor in meta_unet(config).state_dict().items()}
