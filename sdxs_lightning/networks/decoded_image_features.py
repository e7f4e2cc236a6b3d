"""Differentiable decoding of latents, and feature maps of the images, for losses in pixel space."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sdxs_lightning.core.frozen import Frozen
from sdxs_lightning.core.latents import unscale
from sdxs_lightning.families import Family
from sdxs_lightning.networks.image_features import FeatureNetwork, ImageFeatures
from sdxs_lightning.networks.network import without_autocast
from sdxs_lightning.networks.tiny_decoder import load_tiny, tiny_factor

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny


class PixelDecoder:
    """A frozen decoder, always float32: bfloat16 has steps of half a grey level near white, which affect image networks.

    Args:
        weights: folder of an AutoencoderTiny, or of a pipeline with one; None uses the base's VAE.
        option: name of the setting, for error messages.
    """

    def __init__(self, weights: str | None, option: str) -> None:
        self._weights, self._option = weights, option
        self._tiny: Frozen[AutoencoderTiny] | None = None

    def build(self, family: Family) -> None:
        """Loads the AutoencoderTiny, if any. Idempotent.

        Raises:
            FileNotFoundError: if the folder has no AutoencoderTiny.
            ValueError: if it does not fit the base's latents.
        """
        self._family = family
        if self._weights is None or self._tiny is not None:
            return
        tiny = load_tiny(self._weights, self._option)
        channels, side, _ = family.latent_shape()
        found, wanted = (
            (tiny.config.latent_channels, tiny_factor(tiny.config)),
            (channels, family.resolution // side),
        )
        if found != wanted:
            raise ValueError(
                f"the tiny decoder in '{self._weights}' maps {found[0]} latent channels to images {found[1]} times as large, "
                f"and the base has {wanted[0]} channels and factor {wanted[1]}; change {self._option}."
            )
        del tiny.encoder  # never called
        self._tiny = Frozen(tiny)

    def to(self, device: torch.device) -> None:
        """Moves the AutoencoderTiny, if any; the family moves the VAE."""
        if self._tiny is not None:
            self._tiny.to(device)

    @property
    def module(self) -> nn.Module | None:
        """The AutoencoderTiny, for the memory plan; None if the VAE decodes."""
        return self._tiny.module if self._tiny is not None else None

    def __call__(self, latents: Tensor) -> Tensor:
        """Decodes scaled latents (B, C, h, w) to images (B, 3, H, W), about [-1, 1], float32.

        Not clamped, so that values out of range still get gradients.
        """
        with without_autocast(latents.device):
            if self._tiny is None:
                return self._family.decode_with_graph(latents)
            config = self._tiny.module.config
            # As the pipelines do; with our scaling factor of 1 this leaves scaled latents unchanged.
            unscaled = unscale(latents, config.scaling_factor, config.get("shift_factor"))
            images: Tensor = self._tiny.module.decode(unscaled).sample
        return images.float()


class DecodedImageFeatures:
    """Decoder and feature network of a loss on pixels, both frozen.

    Args:
        network: source of the feature network. Not one that a metric uses, which would invalidate the metric.
        decoder: folder of an AutoencoderTiny; None uses the base's VAE.
        option: name of that setting, for error messages.
    """

    def __init__(self, network: ImageFeatures, decoder: str | None, option: str) -> None:
        self._source = network
        self._network: Frozen[FeatureNetwork] | None = None
        self.decode = PixelDecoder(decoder, option)

    def build(self, family: Family) -> None:
        """Loads decoder and feature network. Idempotent."""
        self.decode.build(family)
        if self._network is None:
            self._network = Frozen(self._source.load())

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Moves both networks; the decoder stays float32."""
        assert self._network is not None
        self._network.to(device, dtype)
        self.decode.to(device)

    @property
    def network(self) -> FeatureNetwork:
        """The feature network; available after `build`."""
        assert self._network is not None
        return self._network.module

    def frozen_networks(self, network: str, decoder: str) -> dict[str, nn.Module]:
        """The loaded networks under these names, for the memory plan; excludes the family's VAE."""
        networks: dict[str, nn.Module] = {network: self.network}
        tiny = self.decode.module
        return networks if tiny is None else networks | {decoder: tiny}

    def extract(self, images: Tensor) -> list[Tensor]:
        """Feature maps of images (B, 3, H, W); differentiable."""
        assert self._network is not None
        features: list[Tensor] = self._network(images)
        return features
