"""The Inception network of FID (TensorFlow's graph of 2015-12-05), with blocks defined as paths of layers.

It differs from torchvision's Inception v3 in three ways: average pooling excludes the padding, the last block uses max
pooling, and there are 1008 classes. Parameter names match the weight files of torch-fidelity and pytorch-fid, which share one
layout.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Conv = tuple[int, int, tuple[int, int], int, tuple[int, int]]
"""Channels in, channels out, kernel, stride, padding."""

Path_ = tuple[str | tuple[str, ...], ...]
"""A sequence of layers; a nested tuple is a fork whose outputs are concatenated."""


class ConvNormRelu(nn.Module):
    """Convolution without bias, batch norm (eps 0.001), ReLU."""

    def __init__(self, settings: Conv) -> None:
        super().__init__()
        channels_in, channels_out, kernel, stride, padding = settings
        self.conv = nn.Conv2d(channels_in, channels_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(channels_out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Block(nn.Module):
    """Parallel paths, concatenated along the channels."""

    def __init__(self, convolutions: dict[str, Conv], paths: tuple[Path_, ...]) -> None:
        super().__init__()
        for name, settings in convolutions.items():
            self.add_module(name, ConvNormRelu(settings))
        self.paths = paths

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self._along(path, x) for path in self.paths], dim=1)

    def _along(self, path: Path_, x: Tensor) -> Tensor:
        for step in path:
            x = (
                self._step(step, x)
                if isinstance(step, str)
                else torch.cat([self._step(s, x) for s in step], 1)
            )
        return x

    def _step(self, step: str, x: Tensor) -> Tensor:
        if step == "average":
            return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        if step == "maximum":
            return F.max_pool2d(x, 3, stride=1, padding=1)
        if step == "halve":
            return F.max_pool2d(x, 3, stride=2)
        y: Tensor = self.get_submodule(step)(x)
        return y


def _conv(channels_in: int, channels_out: int, height: int, width: int, stride: int = 1) -> Conv:
    """Convolution with "same" padding at stride 1 and no padding at stride 2."""
    padding = (height // 2, width // 2) if stride == 1 else (0, 0)
    return channels_in, channels_out, (height, width), stride, padding


def block_a(channels: int, pooled: int) -> Block:
    """35 x 35: 1x1, 5x5, double 3x3, pooling."""
    return Block(
        {
            "branch1x1": _conv(channels, 64, 1, 1),
            "branch5x5_1": _conv(channels, 48, 1, 1),
            "branch5x5_2": _conv(48, 64, 5, 5),
            "branch3x3dbl_1": _conv(channels, 64, 1, 1),
            "branch3x3dbl_2": _conv(64, 96, 3, 3),
            "branch3x3dbl_3": _conv(96, 96, 3, 3),
            "branch_pool": _conv(channels, pooled, 1, 1),
        },
        (
            ("branch1x1",),
            ("branch5x5_1", "branch5x5_2"),
            ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"),
            ("average", "branch_pool"),
        ),
    )


def block_b(channels: int) -> Block:
    """35 x 35 to 17 x 17."""
    return Block(
        {
            "branch3x3": _conv(channels, 384, 3, 3, stride=2),
            "branch3x3dbl_1": _conv(channels, 64, 1, 1),
            "branch3x3dbl_2": _conv(64, 96, 3, 3),
            "branch3x3dbl_3": _conv(96, 96, 3, 3, stride=2),
        },
        (("branch3x3",), ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"), ("halve",)),
    )


def block_c(width: int) -> Block:
    """17 x 17, 768 channels: 7x7 as 1x7 and 7x1."""
    long = [f"branch7x7dbl_{i}" for i in range(1, 6)]
    return Block(
        {
            "branch1x1": _conv(768, 192, 1, 1),
            "branch7x7_1": _conv(768, width, 1, 1),
            "branch7x7_2": _conv(width, width, 1, 7),
            "branch7x7_3": _conv(width, 192, 7, 1),
            long[0]: _conv(768, width, 1, 1),
            long[1]: _conv(width, width, 7, 1),
            long[2]: _conv(width, width, 1, 7),
            long[3]: _conv(width, width, 7, 1),
            long[4]: _conv(width, 192, 1, 7),
            "branch_pool": _conv(768, 192, 1, 1),
        },
        (
            ("branch1x1",),
            ("branch7x7_1", "branch7x7_2", "branch7x7_3"),
            tuple(long),
            ("average", "branch_pool"),
        ),
    )


def block_d() -> Block:
    """17 x 17 to 8 x 8."""
    return Block(
        {
            "branch3x3_1": _conv(768, 192, 1, 1),
            "branch3x3_2": _conv(192, 320, 3, 3, stride=2),
            "branch7x7x3_1": _conv(768, 192, 1, 1),
            "branch7x7x3_2": _conv(192, 192, 1, 7),
            "branch7x7x3_3": _conv(192, 192, 7, 1),
            "branch7x7x3_4": _conv(192, 192, 3, 3, stride=2),
        },
        (
            ("branch3x3_1", "branch3x3_2"),
            ("branch7x7x3_1", "branch7x7x3_2", "branch7x7x3_3", "branch7x7x3_4"),
            ("halve",),
        ),
    )


def block_e(channels: int, pooling: str) -> Block:
    """8 x 8: 3x3 as parallel 1x3 and 3x1; the last block uses max pooling, as the TensorFlow graph does."""
    return Block(
        {
            "branch1x1": _conv(channels, 320, 1, 1),
            "branch3x3_1": _conv(channels, 384, 1, 1),
            "branch3x3_2a": _conv(384, 384, 1, 3),
            "branch3x3_2b": _conv(384, 384, 3, 1),
            "branch3x3dbl_1": _conv(channels, 448, 1, 1),
            "branch3x3dbl_2": _conv(448, 384, 3, 3),
            "branch3x3dbl_3a": _conv(384, 384, 1, 3),
            "branch3x3dbl_3b": _conv(384, 384, 3, 1),
            "branch_pool": _conv(channels, 192, 1, 1),
        },
        (
            ("branch1x1",),
            ("branch3x3_1", ("branch3x3_2a", "branch3x3_2b")),
            ("branch3x3dbl_1", "branch3x3dbl_2", ("branch3x3dbl_3a", "branch3x3dbl_3b")),
            (pooling, "branch_pool"),
        ),
    )


class Inception(nn.Module):
    """Maps normalised (B,3,299,299) pixels to the 2048 pooled features before the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNormRelu((3, 32, (3, 3), 2, (0, 0)))
        self.Conv2d_2a_3x3 = ConvNormRelu((32, 32, (3, 3), 1, (0, 0)))
        self.Conv2d_2b_3x3 = ConvNormRelu((32, 64, (3, 3), 1, (1, 1)))
        self.Conv2d_3b_1x1 = ConvNormRelu((64, 80, (1, 1), 1, (0, 0)))
        self.Conv2d_4a_3x3 = ConvNormRelu((80, 192, (3, 3), 1, (0, 0)))
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = block_a(192, 32), block_a(256, 64), block_a(288, 64)
        self.Mixed_6a = block_b(288)
        self.Mixed_6b, self.Mixed_6c = block_c(128), block_c(160)
        self.Mixed_6d, self.Mixed_6e = block_c(160), block_c(192)
        self.Mixed_7a = block_d()
        self.Mixed_7b, self.Mixed_7c = block_e(1280, "average"), block_e(2048, "maximum")
        self.fc = nn.Linear(2048, 1008)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 2048) pooled features."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(pixels)))
        x = F.max_pool2d(x, 3, stride=2)
        x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, stride=2)
        for name, block in self.named_children():
            if name.startswith("Mixed"):
                x = block(x)
        return F.adaptive_avg_pool2d(x, 1).flatten(1)

    def logits(self, features: Tensor) -> Tensor:
        """(B, 1008) logits of pooled features without the classifier's bias, as Inception scores take them."""
        return F.linear(features, self.fc.weight)
