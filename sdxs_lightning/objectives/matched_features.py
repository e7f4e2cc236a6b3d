"""Features for feature matching: of the base's U-Net encoder, or of an image network."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from sdxs_lightning.core.batch import Conditioning
from sdxs_lightning.families import Family
from sdxs_lightning.networks.decoded_image_features import DecodedImageFeatures
from sdxs_lightning.networks.feature_taps import bottleneck_of
from sdxs_lightning.networks.image_features import ImageFeatures
from sdxs_lightning.objectives.term import DistillationContext


@runtime_checkable
class MatchedFeatures(Protocol):
    """Maps clean latents to named feature maps; `features.class_path` of a stage names an implementation."""

    needs_real_score: bool
    """Whether `__call__` uses `context.real_score`."""

    def build(self, family: Family) -> None:
        """Loads its own frozen networks. Idempotent."""

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Moves the loaded networks."""

    def frozen_networks(self) -> dict[str, nn.Module]:
        """The loaded networks by name, for the memory plan."""

    def __call__(
        self, latents: Tensor, conditioning: Conditioning, context: DistillationContext
    ) -> dict[str, Tensor]:
        """Maps scaled latents (B, C, h, w) to feature maps (B, C_l, h_l, w_l) by layer; differentiable."""


class EncoderFeatures:
    """Blocks of the base's U-Net encoder: no further network, no decoding, a third of the cost of a U-Net pass.

    Args:
        blocks: module names, for example "down_blocks.0"; None uses all down blocks and the mid block.
        timestep: timestep input of the U-Net; 0 for clean latents.

    Source: SDXS, arXiv:2403.16627, section 3.2, names the U-Net's encoder as a feature network; layers and timestep are not
        published and are ours.
    """

    needs_real_score = True

    def __init__(self, blocks: list[str] | None = None, timestep: int = 0) -> None:
        if timestep < 0:
            raise ValueError(f"features.init_args.timestep must be 0 or more, got {timestep}.")
        self.blocks, self.timestep = blocks, timestep

    def build(self, family: Family) -> None:
        """Nothing: the network is the real score."""

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Nothing: the network is the real score."""

    def frozen_networks(self) -> dict[str, nn.Module]:
        return {}

    def __call__(
        self, latents: Tensor, conditioning: Conditioning, context: DistillationContext
    ) -> dict[str, Tensor]:
        assert context.real_score is not None
        unet = context.real_score.unet
        blocks = self.blocks
        if blocks is None:
            blocks = [f"down_blocks.{i}" for i in range(len(unet.down_blocks))]
            blocks += [bottleneck_of(unet)] if unet.mid_block is not None else []
        timesteps = torch.full((len(latents),), self.timestep, dtype=torch.int64, device=latents.device)
        return context.real_score.encoder_features(latents, timesteps, conditioning, blocks)


class PixelFeatures:
    """Features of an image network on the decoded latents.

    Args:
        network: source of the feature network. Not one that a metric uses, which would invalidate the metric.
        decoder: folder of an AutoencoderTiny; None uses the base's VAE, which is slow and needs much memory with a graph.

    Source: SDXS, arXiv:2403.16627, section 3.2, with VGG and DINOv2, and the tiny decoder.
    """

    needs_real_score = False

    def __init__(self, network: ImageFeatures, decoder: str | None = None) -> None:
        self._image_features = DecodedImageFeatures(network, decoder, "features.init_args.decoder")

    def build(self, family: Family) -> None:
        self._image_features.build(family)

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        self._image_features.to(device, dtype)

    def frozen_networks(self) -> dict[str, nn.Module]:
        """The feature network, and the decoder unless it is the base's VAE."""
        return self._image_features.frozen_networks("matched_features", "feature_decoder")

    def __call__(
        self, latents: Tensor, conditioning: Conditioning, context: DistillationContext
    ) -> dict[str, Tensor]:
        maps = self._image_features.extract(self._image_features.decode(latents))
        return {f"layer_{i}": features for i, features in enumerate(maps)}
