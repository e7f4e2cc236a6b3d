"""The discriminator of the projected GAN: a small convolutional head on each of several frozen feature maps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from sdxs_lightning.networks.image_features import FeatureShape
from sdxs_lightning.networks.network import Network, without_autocast


class ProjectedDiscriminator(Network):
    """One head per tapped layer of a frozen feature network, which is not part of this module.

    The heads always run in float32: they are small, and spectral normalisation iterates on their weights.

    Args:
        optimizer: called with the trainable parameters.
        lr_scheduler: stepped once per update of the discriminator; None keeps the rate constant.
        seed: seed of the initial weights, which are thus equal on every rank.

    Source: StyleGAN-T, arXiv:2301.09515, section 4.2, and ADD, arXiv:2311.17042, section 3.2: frozen ViT, equal heads of a
        pointwise and a wider spectrally normalised convolution. Departures: 3x3 on the map instead of 9 along the token
        sequence, group instead of virtual batch normalisation (so that samples are independent), no conditioning.
    """

    heads: nn.ModuleList

    def __init__(
        self, optimizer: OptimizerCallable, lr_scheduler: LRSchedulerCallable | None = None, seed: int = 0
    ) -> None:
        super().__init__(optimizer, lr_scheduler)
        self._seed = seed

    def build(self, feature_shapes: Sequence[FeatureShape]) -> None:
        """Makes a head for each feature map (C, h, w). Idempotent."""
        if hasattr(self, "heads"):
            return
        # A random state of its own, so that heads do not depend on earlier draws, which differ between ranks.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed)
            self.heads = nn.ModuleList(_Head(channels) for channels, _, _ in feature_shapes)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Maps features (B, C, h, w) of each head to logits (B, h * w), float32; positive means real."""
        with without_autocast(features[0].device):
            return [head(part.float()) for head, part in zip(self.heads, features, strict=True)]


class _Head(nn.Module):
    """A 1x1 and a residual 3x3 convolution, then one logit per position."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.project = _layer(channels, kernel_size=1)
        self.look_around = _layer(channels, kernel_size=3)
        self.logits = spectral_norm(nn.Conv2d(channels, 1, kernel_size=1))

    def forward(self, features: Tensor) -> Tensor:
        hidden = self.project(features)
        hidden = (hidden + self.look_around(hidden)) / math.sqrt(2)  # keeps the variance
        logits: Tensor = self.logits(hidden)
        return logits.flatten(1)


def _layer(channels: int, kernel_size: int) -> nn.Sequential:
    convolution = nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2)
    norm = nn.GroupNorm(math.gcd(32, channels), channels)
    return nn.Sequential(spectral_norm(convolution), norm, nn.LeakyReLU(0.2))
