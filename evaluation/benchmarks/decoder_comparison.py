"""A tiny decoder beside its base's own: distances of images, both decoders, and what is summed over batches."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor
from torch.nn import functional as F

from sdxs_lightning.core.latents import from_uint8, to_uint8
from sdxs_lightning.families import Family
from sdxs_lightning.networks.image_features import FeatureNetwork

PAIRS = ("kl_real", "tiny_real", "tiny_kl")
"""What is compared with what: the base's decoder with the real image, the tiny one with that, and both with each other."""
DIFFERENCE_GAIN = 8


def psnr_db(images_uint8: Tensor, reference_uint8: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image, in dB: 10 log10(255^2 / mean square error).

    Args:
        images_uint8: (B, 3, H, W), uint8.
        reference_uint8: likewise.

    Returns:
        (B,), float64; infinite for equal images.
    """
    error = images_uint8.double() - reference_uint8.double()
    return 10 * torch.log10(255**2 / error.square().mean(dim=(1, 2, 3)))


def feature_distance(network: FeatureNetwork, images: Tensor, reference: Tensor) -> Tensor:
    """How far images are from each other for a frozen network: 0 for equal ones, at most 4 for opposite features.

    The features of each place are set to length 1; squared distances are averaged over places and layers.

    Args:
        network: gives the feature maps.
        images: (B, 3, H, W), float, in [-1, 1].
        reference: likewise.

    Returns:
        (B,), float32.

    Source: LPIPS, arXiv:1801.03924, eq. 1, without its learnt channel weights.
    """
    distances = []
    for one, other in zip(network(images), network(reference), strict=True):
        difference = F.normalize(one.float(), dim=1) - F.normalize(other.float(), dim=1)
        distances.append(difference.square().sum(dim=1).mean(dim=(1, 2)))
    return torch.stack(distances).mean(dim=0)


@dataclass
class Decoders:
    """The base's autoencoder and the tiny one, in float32 on one device."""

    kl: AutoencoderKL
    """Encodes the images, and decodes as the reference."""
    tiny: AutoencoderTiny
    """Decodes scaled latents."""
    family: Family
    """The base, which says how its latents are scaled."""

    def latents(self, images: Tensor) -> Tensor:
        """Scaled latents of images in [-1, 1]: the mean of the posterior."""
        return self.family.scale_latents(self.kl.encode(images).latent_dist.mode())

    def decode_kl(self, latents: Tensor) -> Tensor:
        """Scaled latents -> images by the base's decoder."""
        images: Tensor = self.kl.decode(self.family.unscale_latents(latents)).sample
        return images

    def decode_tiny(self, latents: Tensor) -> Tensor:
        """Scaled latents -> images by the tiny decoder."""
        images: Tensor = self.tiny.decode(latents).sample
        return images

    def parameters(self) -> dict[str, int]:
        """Of what decodes, counted."""
        kl = [self.kl.decoder, *([self.kl.post_quant_conv] if self.kl.post_quant_conv is not None else [])]
        return {
            "kl": sum(parameter.numel() for module in kl for parameter in module.parameters()),
            "tiny": sum(parameter.numel() for parameter in self.tiny.decoder.parameters()),
        }


@dataclass
class Tally:
    """What is summed over batches."""

    psnr: dict[str, list[Tensor]] = field(default_factory=lambda: {pair: [] for pair in PAIRS})
    """dB of each image, by pair."""
    distance: dict[str, list[Tensor]] = field(default_factory=lambda: {pair: [] for pair in PAIRS})
    """Feature distance of each image, by pair."""
    shown: dict[str, Tensor] = field(default_factory=dict)
    """The first images, for the sheet."""

    def add(self, real_uint8: Tensor, decoders: Decoders, network: FeatureNetwork, columns: int) -> Tensor:
        """Measures a batch; returns its latents."""
        latents = decoders.latents(from_uint8(real_uint8))
        kl, tiny = to_uint8(decoders.decode_kl(latents)), to_uint8(decoders.decode_tiny(latents))
        for pair, one, other in zip(PAIRS, (kl, tiny, tiny), (real_uint8, real_uint8, kl), strict=True):
            self.psnr[pair].append(psnr_db(one, other).cpu())
            self.distance[pair].append(feature_distance(network, from_uint8(one), from_uint8(other)).cpu())
        if not self.shown:
            error = (tiny.int() - kl.int()).abs().mul(DIFFERENCE_GAIN).clamp(max=255).to(torch.uint8)
            rows = {
                "real": real_uint8,
                "KL decoder": kl,
                "tiny decoder": tiny,
                f"difference\nx {DIFFERENCE_GAIN}": error,
            }
            self.shown = {label: images[:columns].cpu() for label, images in rows.items()}
        return latents

    def means(self) -> dict[str, Any]:
        """Averages over images."""
        psnr = {pair: torch.cat(values).mean().item() for pair, values in self.psnr.items()}
        return {
            "psnr_db": psnr,
            "psnr_loss_db": psnr["kl_real"] - psnr["tiny_real"],
            "feature_distance": {
                pair: torch.cat(values).mean().item() for pair, values in self.distance.items()
            },
        }


def time_ratio(decoders: Decoders, latents: Tensor, repeats: int = 15) -> float:
    """Time of the base's decoder over that of the tiny one: median over alternating pairs, after one pair to warm up.

    Alternating, and a ratio of neighbours: what else the machine does meets both.
    """
    ratios = []
    for _ in range(repeats + 1):
        seconds = [_seconds(decode, latents) for decode in (decoders.decode_kl, decoders.decode_tiny)]
        ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios[1:])


def _seconds(decode: Callable[[Tensor], Tensor], latents: Tensor) -> float:
    if latents.device.type == "cuda":
        torch.cuda.synchronize(latents.device)
    start = time.perf_counter()
    decode(latents)
    if latents.device.type == "cuda":
        torch.cuda.synchronize(latents.device)
    return time.perf_counter() - start
