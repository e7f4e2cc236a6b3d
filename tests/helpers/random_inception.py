"""One Inception with random weights, in the file layout that all tools read, and its first layer as a cheap network."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evaluation.networks.inception import InceptionFeatures
from evaluation.networks.inception_network import Inception
from evaluation.networks.network_features import full_precision


def write_inception(path: Path, seed: int = 0) -> Path:
    """Weights that keep the variance from layer to layer, so that features differ between images."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        with torch.device("meta"):
            network = Inception()
        network = network.to_empty(device="cpu")
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                fan_in = module.weight[0].numel()
                module.weight.data.normal_(0, (2 / fan_in) ** 0.5)
                if module.bias is not None:
                    module.bias.data.zero_()
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(network.state_dict(), path)
    return path


class FirstLayer:
    """Inception's 64 averages after the first pooling: what torch-fidelity and pytorch-fid call 64 features.

    With 64 dimensions a few dozen images have a covariance of full rank, and the tools agree to more digits than with 2048.
    """

    name = "first-layer"
    dimensions = 64

    def __init__(self, inception: InceptionFeatures) -> None:
        self.inception = inception

    def __call__(self, images_uint8: Tensor) -> Tensor:
        with full_precision(images_uint8.device):
            return first_layer(self.inception.network, self.inception.pixels(images_uint8))

    def identity(self) -> dict[str, str]:
        return {"network": self.name}


def first_layer(network: Inception, pixels: Tensor) -> Tensor:
    """(B,3,299,299) normalised pixels to (B,64)."""
    x = network.Conv2d_2b_3x3(network.Conv2d_2a_3x3(network.Conv2d_1a_3x3(pixels)))
    return F.adaptive_avg_pool2d(F.max_pool2d(x, 3, stride=2), 1).flatten(1)


def textures(count: int, seed: int, size: int = 96) -> Tensor:
    """(count,3,size,size) uint8: patches of two frequencies with noise; another seed is another kind of image."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.zeros(count, 3, size, size)
    for cells, weight in ((4, 1.0), (16 + 4 * seed, 0.6), (size, 0.15)):
        noise = torch.rand(count, 3, cells, cells, generator=generator)
        images += weight * F.interpolate(noise, (size, size), mode="bilinear")
    return (images / 1.75 * 255).round().to(torch.uint8)
