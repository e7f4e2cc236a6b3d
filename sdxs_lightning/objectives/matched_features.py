"""What feature matching compares: features of the base's own encoder, or of an image network."""

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
    """Maps clean latents to named feature maps; what `features.class_path` of a stage names."""

    needs_real_score: bool
    """Whether it calls `context.real_score`."""

    def build(self, family: Family) -> None:
        """Loads its own frozen networks; a second call does nothing."""

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Moves what was loaded."""

    def frozen_networks(self) -> dict[str, nn.Module]:
        """What was loaded, by name, for the memory plan."""

    def __call__(
        self, latents: Tensor, conditioning: Conditioning, context: DistillationContext
    ) -> dict[str, Tensor]:
        """(B, C_l, h_l, w_l) by layer, with graph where latents (B, C, h, w), scaled, have one."""


class EncoderFeatures:
    """Blocks of the base's own U-Net encoder: no other network, no decoding, at a third of a U-Net pass.

    Args:
        blocks: module names, for example "down_blocks.0"; None takes every down block and the mid block.
        timestep: input of the U-Net; 0 is right for clean latents.

    Source: SDXS, arXiv:2403.16627, section 3.2, names the U-Net's encoder as one of its feature networks, and neither its
        layers nor its timestep: both are ours.
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
        """None of its own."""
        return {}

    def __call__(
        self, latents: Tensor, conditioning: Conditioning, context: DistillationContext
    ) -> dict[str, Tensor]:
        """See `MatchedFeatures`."""
        assert context.real_score is not None
        unet = context.real_score.unet
        blocks = self.blocks
        if blocks is None:
            blocks = [f"down_blocks.{i}" for i in range(len(unet.down_blocks))]
            blocks += [bottleneck_of(unet)] if unet.mid_block is not None else []
        timesteps = torch.full((len(latents),), self.timestep, dtype=torch.int64, device=latents.device)
        return context.real_score.encoder_features(latents, timesteps, conditioning, blocks)


class PixelFeatures:
    """An image network's features of the decoded latents.

    Args:
        network: where the network comes from; not one that a metric uses, or that metric means nothing.
        decoder: folder of an AutoencoderTiny that decodes; None is the base's own VAE, slow and large with a graph.

    Source: SDXS, arXiv:2403.16627, section 3.2, with VGG and DINOv2 in this place, and the tiny decoder.
    """

    needs_real_score = False

    def __init__(self, network: ImageFeatures, decoder: str | None = None) -> None:
        self._image_features = DecodedImageFeatures(network, decoder, "features.init_args.decoder")

    def build(self, family: Family) -> None:
        """Loads decoder and feature network."""
        self._image_features.build(family)

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Moves decoder and feature network."""
        self._image_features.to(device, dtype)

    def frozen_networks(self) -> dict[str, nn.Module]:
        """Feature network, and decoder where it is not the base's."""
        return self._image_features.frozen_networks("matched_features", "feature_decoder")

    def __call__(
        self, latents: Tensor, conditioning: Conditioning, context: DistillationContext
    ) -> dict[str, Tensor]:
        """See `MatchedFeatures`."""
        maps = self._image_features.extract(self._image_features.decode(latents))
        return {f"layer_{i}": features for i, features in enumerate(maps)}
