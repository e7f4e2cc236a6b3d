"""A frozen image network that looks at latents: it decodes them, and returns feature maps of the images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sdxs_lightning.core.frozen import Frozen
from sdxs_lightning.families import Family
from sdxs_lightning.networks.image_features import FeatureNetwork, ImageFeatures
from sdxs_lightning.networks.pixel_decoder import PixelDecoder


class DecodedImageFeatures:
    """Decoder and feature network of a loss on pixels.

    Args:
        network: where the feature network comes from; not the one that judges the result, or its score means nothing.
        decoder: folder of an AutoencoderTiny; None is the base's own VAE.
        option: the setting that names that folder, for messages.
    """

    def __init__(self, network: ImageFeatures, decoder: str | None, option: str) -> None:
        self._source = network
        self._network: Frozen[FeatureNetwork] | None = None
        self.decode = PixelDecoder(decoder, option)

    def build(self, family: Family) -> None:
        """Loads both; a second call does nothing."""
        self.decode.build(family)
        if self._network is None:
            self._network = Frozen(self._source.load())

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Moves both; the decoder stays float32."""
        assert self._network is not None
        self._network.to(device, dtype)
        self.decode.to(device)

    @property
    def network(self) -> FeatureNetwork:
        """The feature network, once it was built."""
        assert self._network is not None
        return self._network.module

    def frozen_networks(self, network: str, decoder: str) -> dict[str, nn.Module]:
        """What was loaded, under these names, for the memory plan; the VAE is the family's."""
        networks: dict[str, nn.Module] = {network: self.network}
        tiny = self.decode.module
        return networks if tiny is None else networks | {decoder: tiny}

    def see(self, images: Tensor) -> list[Tensor]:
        """Feature maps of images (B, 3, H, W); with graph where they have one."""
        assert self._network is not None
        features: list[Tensor] = self._network(images)
        return features
