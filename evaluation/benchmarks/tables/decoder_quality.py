"""A tiny decoder against its base's decoder on latents of real images: PSNR, feature distance, time, image sheet."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageOps
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

from data.toy.world import image_at
from evaluation.benchmarks.tables.score_files import write_scores
from evaluation.images.image_sets import open_images
from evaluation.metrics.estimates import Estimate, mean_estimate
from evaluation.networks.network_features import full_precision
from evaluation.protocols.image_protocol import metric_hash
from evaluation.reports.grids import sheet
from evaluation.runner.machine import where
from evaluation.user_errors import as_user_errors
from sdxs_lightning.core.latents import from_uint8, to_uint8
from sdxs_lightning.core.model_hash import hash_weights
from sdxs_lightning.export import fitting_tiny_vae
from sdxs_lightning.families.detect import detect_family
from sdxs_lightning.inference.generator import torch_device
from sdxs_lightning.networks.image_features import (
    Dinov2Features,
    FeatureNetwork,
    ImageFeatures,
    OpenClipFeatures,
    TimmFeatures,
)

if TYPE_CHECKING:
    from evaluation.benchmarks.tables.options import DecoderOptions

PAIRS = ("kl_real", "tiny_real", "tiny_kl")
"""Compared pairs: base decoder and real image, tiny decoder and real image, both decoders."""
DIFFERENCE_GAIN = 8


@as_user_errors()
def decoder(options: DecoderOptions) -> str:
    """Decode the images' latents with both decoders and compare them."""
    device = torch_device(options.device)
    family = detect_family(options.base)
    kl, tiny = (
        family.load_vae().eval().to(device),
        fitting_tiny_vae(options.decoder, family).eval().to(device),
    )

    def decode_kl(latents: Tensor) -> Tensor:
        images: Tensor = kl.decode(family.unscale_latents(latents)).sample
        return images

    def decode_tiny(latents: Tensor) -> Tensor:
        images: Tensor = tiny.decode(latents).sample
        return images

    network = feature_network(options.features).load().eval().to(device)
    images = (
        toy_images(options.images)
        if options.source is None
        else stored_images(options.source, options.images, family.resolution)
    )
    batches = map(torch.stack, iter(lambda: list(islice(images, options.batch_size)), []))
    psnr: dict[str, list[Tensor]] = {pair: [] for pair in PAIRS}
    distances: dict[str, list[Tensor]] = {pair: [] for pair in PAIRS}
    rows, first = dict[str, Tensor](), torch.empty(0)
    with full_precision(device):
        count = -(-options.images // options.batch_size)
        for real in track(batches, "decoding", count, console=Console(stderr=True)):
            real = real.to(device)
            latents = family.scale_latents(kl.encode(from_uint8(real)).latent_dist.mode())
            by_kl, by_tiny = to_uint8(decode_kl(latents)), to_uint8(decode_tiny(latents))
            compared = (by_kl, real), (by_tiny, real), (by_tiny, by_kl)
            for pair, (one, other) in zip(PAIRS, compared, strict=True):
                psnr[pair].append(psnr_db(one, other).cpu())
                distance = feature_distance(network, from_uint8(one), from_uint8(other))
                distances[pair].append(distance.cpu())
            if not rows:
                first, columns = latents, options.columns
                error = (by_tiny.int() - by_kl.int()).abs().mul(DIFFERENCE_GAIN).clamp(max=255).byte()
                rows = {
                    "real": real,
                    "KL decoder": by_kl,
                    "tiny decoder": by_tiny,
                    f"difference\nx {DIFFERENCE_GAIN}": error,
                }
                rows = {label: shown[:columns] for label, shown in rows.items()}
        ratios = {
            str(size): time_ratio(decode_kl, decode_tiny, first[:size]) for size in sorted({1, len(first)})
        }
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        page = sheet(rows, [""] * len(rows["real"]))
        page.save(options.out.with_suffix(".png"), optimize=True)
    values = {pair: torch.cat(found) for pair, found in psnr.items()}
    apart = {pair: torch.cat(found) for pair, found in distances.items()}
    means = {pair: found.mean().item() for pair, found in values.items()}
    estimates = {
        "psnr_db": mean_estimate(values["tiny_real"]),
        "psnr_loss_db": mean_estimate(values["kl_real"] - values["tiny_real"]),
        "feature_distance": mean_estimate(apart["tiny_real"].double()),
    }
    source = "toy:test" if options.source is None else open_images(options.source).digest()
    settings = {
        "vae_sha256": hash_weights(family.folder / "vae"),
        "source": source,
        "side_px": family.resolution,
    }
    features = {"features": options.features}
    result = {
        "base": options.base,
        "vae_sha256": settings["vae_sha256"],
        "decoder": options.decoder,
        "decoder_sha256": hash_weights(options.decoder),
        "images": sum(map(len, psnr["kl_real"])),
        "source": options.source or "toy world, test split",
        "protocol": {"name": "decoder"},
        "metrics": {
            name: _entry(name, one, {**settings, **(features if name == "feature_distance" else {})})
            for name, one in estimates.items()
        },
        "psnr_db": means,
        "psnr_loss_db": estimates["psnr_loss_db"].value,
        "feature_distance": {pair: found.mean().item() for pair, found in apart.items()},
        "features": options.features,
        "parameters": {
            "kl": _parameters(kl.decoder)
            + (_parameters(kl.post_quant_conv) if kl.post_quant_conv is not None else 0),
            "tiny": _parameters(tiny.decoder),
        },
        "time_kl_over_tiny": ratios,
        **where(device),
    }
    return write_scores(options.out, result)


def _entry(name: str, estimate: Estimate, settings: dict[str, Any]) -> dict[str, Any]:
    """A metric as in the files of `evaluation.evaluate`."""
    hashed = {"metric": name, "images": estimate.samples, **settings}
    return {
        "value": estimate.value,
        "samples": estimate.samples,
        "low": estimate.low,
        "high": estimate.high,
        "hash": metric_hash(hashed),
        "settings": hashed,
    }


def feature_network(text: str) -> ImageFeatures:
    """The network of `--features`.

    Raises:
        ValueError: for an invalid form.
    """
    kind, *parts = text.split(":")
    kinds: dict[tuple[str, int], Callable[..., ImageFeatures]] = {
        ("open_clip", 2): OpenClipFeatures,
        ("dinov2", 2): Dinov2Features,
        ("timm", 3): TimmFeatures,
    }
    if (kind, len(parts)) not in kinds or not all(layer.isdigit() for layer in parts[-1].split(",")):
        raise ValueError(
            f"--features takes open_clip:FOLDER:LAYERS, dinov2:FOLDER:LAYERS or timm:NAME:FILE:LAYERS with layers such as "
            f"2,5,8, got '{text}'"
        )
    return kinds[kind, len(parts)](*parts[:-1], [int(layer) for layer in parts[-1].split(",")])


def toy_images(count: int) -> Iterator[Tensor]:
    """The toy world's test images, on which nothing was trained: (3, H, W) uint8."""
    for index in range(count):
        yield torch.from_numpy(image_at("test", index)).permute(2, 0, 1)


def stored_images(source: str, count: int, side_px: int) -> Iterator[Tensor]:
    """The first images of a folder, zip file or shards, cropped to a centred square and resized: (3, side, side) uint8.

    Raises:
        UserError: without images.
    """
    images = open_images(source)
    for number in range(min(count, len(images.names))):
        image = ImageOps.fit(images.read(number), (side_px, side_px), Image.Resampling.LANCZOS)
        yield torch.from_numpy(np.array(image)).permute(2, 0, 1)


def psnr_db(images_uint8: Tensor, reference_uint8: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image, in dB: 10 log10(255^2 / mean square error).

    Args:
        images_uint8: (B, 3, H, W), uint8.
        reference_uint8: (B, 3, H, W), uint8.

    Returns:
        (B,), float64; infinite for equal images.
    """
    error = images_uint8.double() - reference_uint8.double()
    return 10 * torch.log10(255**2 / error.square().mean(dim=(1, 2, 3)))


def feature_distance(network: FeatureNetwork, images: Tensor, reference: Tensor) -> Tensor:
    """Distance of images in a frozen network's features: 0 for equal images, at most 4 for opposite features.

    The features of each position are normalised to length 1; squared distances are averaged over positions and layers.

    Args:
        network: computes the feature maps.
        images: (B, 3, H, W), float, in [-1, 1].
        reference: (B, 3, H, W), float, in [-1, 1].

    Returns:
        (B,), float32.

    Source: LPIPS, arXiv:1801.03924, eq. 1, without its learnt channel weights.
    """
    distances = []
    for one, other in zip(network(images), network(reference), strict=True):
        difference = F.normalize(one.float(), dim=1) - F.normalize(other.float(), dim=1)
        distances.append(difference.square().sum(dim=1).mean(dim=(1, 2)))
    return torch.stack(distances).mean(dim=0)


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def time_ratio(
    slow: Callable[[Tensor], Tensor], fast: Callable[[Tensor], Tensor], latents: Tensor, repeats: int = 15
) -> float:
    """Ratio of the decoders' times: median over alternating pairs, after one untimed pair.

    They alternate so that other load on the machine affects both equally.
    """
    ratios = [_seconds(slow, latents) / _seconds(fast, latents) for _ in range(repeats + 1)]
    return statistics.median(ratios[1:])


def _seconds(decode: Callable[[Tensor], Tensor], latents: Tensor) -> float:
    def synchronize() -> None:
        if latents.device.type == "cuda":
            torch.cuda.synchronize(latents.device)

    synchronize()
    start = time.perf_counter()
    decode(latents)
    synchronize()
    return time.perf_counter() - start
