"""The discriminator on latents: a small head on a U-Net's bottleneck."""

from __future__ import annotations

import math

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from sdxs_lightning.networks.network import Network


class Discriminator(Network):
    """Strided convolutions down to 4x4, one convolution over the rest, and a linear output layer.

    For SD (1280 x 8 x 8) and SDXL (1280 x 32 x 32) these are DMD2's heads; other sizes follow the same rule.

    Args:
        optimizer: called with the trainable parameters.
        lr_scheduler: stepped once per update of the discriminator; None keeps the rate constant.
        seed: seed of the initial weights, which are thus equal on every rank.

    Source: DMD2, arXiv:2405.14867, section 4.3 and appendix; METHOD of the released code for the layer sizes.
    """

    head: nn.Sequential

    def __init__(
        self, optimizer: OptimizerCallable, lr_scheduler: LRSchedulerCallable | None = None, seed: int = 0
    ) -> None:
        super().__init__(optimizer, lr_scheduler)
        self._seed = seed

    def build(self, feature_shape: tuple[int, int, int]) -> None:
        """Makes the head for features (C, h, w). Idempotent."""
        if hasattr(self, "head"):
            return
        # A random state of its own, so that the head does not depend on earlier draws, which differ between ranks.
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(self._seed)
            self.head = _head(*feature_shape)

    def forward(self, features: Tensor) -> Tensor:
        """Maps features (B, C, h, w) to logits (B,), float32; positive means real."""
        logits: Tensor = self.head(features)
        return logits.flatten().float()


def _head(channels: int, height: int, width: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    while min(height, width) >= 8:
        layers += [nn.Conv2d(channels, channels, kernel_size=4, stride=2, padding=1), *_norm(channels)]
        height, width = height // 2, width // 2
    layers += [nn.Conv2d(channels, channels, kernel_size=(height, width)), *_norm(channels)]
    layers += [nn.Conv2d(channels, 1, kernel_size=1)]
    return nn.Sequential(*layers)


def _norm(channels: int) -> tuple[nn.Module, nn.Module]:
    # 32 groups where they divide the channels, as in DMD2; tiny test networks have fewer channels.
    return nn.GroupNorm(math.gcd(32, channels), channels), nn.SiLU()
