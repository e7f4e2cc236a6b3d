"""Measure a tiny decoder: `python -m evaluation.decoder --base DIR --decoder DIR --out FILE.json`."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from PIL import Image, ImageOps
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from torch.nn import functional as F

from data.toy.world import image_at
from evaluation.features import full_precision
from evaluation.machine import where
from evaluation.pictures import sheet
from evaluation.protocols import hash_weights
from sdxs_lightning.export import fitting_tiny_vae
from sdxs_lightning.families import Family
from sdxs_lightning.families.sd import StableDiffusion
from sdxs_lightning.families.sdxl import StableDiffusionXL
from sdxs_lightning.latents import from_uint8, scale, to_uint8, unscale
from sdxs_lightning.modules.image_features import (
    Dinov2Features,
    FeatureNetwork,
    ImageFeatures,
    OpenClipFeatures,
    TimmFeatures,
)

TOY_FEATURES = "open_clip:data/toy/clip:0,1,2"
PICTURE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}
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


def features_from(text: str) -> ImageFeatures:
    """The feature network that `--features` names.

    Raises:
        ValueError: for a text of another form.
    """
    parts = text.split(":")
    kinds: dict[tuple[str, int], Callable[..., ImageFeatures]] = {
        ("open_clip", 3): OpenClipFeatures,
        ("dinov2", 3): Dinov2Features,
        ("timm", 4): TimmFeatures,
    }
    kind = kinds.get((parts[0], len(parts)))
    layers = parts[-1].split(",")
    if kind is None or not all(layer.isdigit() for layer in layers):
        raise ValueError(
            f"--features takes open_clip:FOLDER:LAYERS, dinov2:FOLDER:LAYERS or timm:NAME:FILE:LAYERS with layers such as "
            f"2,5,8, got '{text}'"
        )
    return kind(*parts[1:-1], [int(layer) for layer in layers])


def family_at(base: str) -> Family:
    """The family of a base folder, by what its model_index.json says; `sd.py` words the refusals."""
    index = Path(base) / "model_index.json"
    named = json.loads(index.read_text()).get("_class_name", "") if index.is_file() else ""
    return StableDiffusionXL(base) if "XL" in named else StableDiffusion(base)


def toy_pictures(count: int) -> Iterator[Tensor]:
    """The toy world's test images, which trained nothing: (3, H, W) uint8."""
    for index in range(count):
        yield torch.from_numpy(image_at("test", index)).permute(2, 0, 1)


def folder_pictures(folder: str, count: int, side_px: int) -> Iterator[Tensor]:
    """The first images of a folder by name, cropped to a centred square and resized: (3, side, side) uint8.

    Raises:
        FileNotFoundError: without images.
    """
    paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES)
    if not paths:
        raise FileNotFoundError(
            f"no {', '.join(sorted(PICTURE_SUFFIXES))} under '{folder}'; --source takes a folder of images"
        )
    for path in paths[:count]:
        with Image.open(path) as opened:
            picture = ImageOps.fit(opened.convert("RGB"), (side_px, side_px), Image.Resampling.LANCZOS)
        yield torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def batches(pictures: Iterator[Tensor], size: int) -> Iterator[Tensor]:
    """Stacks of at most `size` pictures."""
    waiting: list[Tensor] = []
    for picture in pictures:
        waiting.append(picture)
        if len(waiting) == size:
            yield torch.stack(waiting)
            waiting = []
    if waiting:
        yield torch.stack(waiting)


@dataclass
class Decoders:
    """The base's autoencoder and the tiny one, in float32 on one device."""

    kl: AutoencoderKL
    """Encodes the images, and decodes as the reference."""
    tiny: AutoencoderTiny
    """Decodes scaled latents."""
    scaling_factor: float
    """Of the base's latents."""

    def latents(self, images: Tensor) -> Tensor:
        """Scaled latents of images in [-1, 1]: the mean of the posterior."""
        return scale(self.kl.encode(images).latent_dist.mode(), self.scaling_factor)

    def decode_kl(self, latents: Tensor) -> Tensor:
        """Scaled latents -> images by the base's decoder."""
        images: Tensor = self.kl.decode(unscale(latents, self.scaling_factor)).sample
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


def evaluate(options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Load, decode, compare.

    Returns:
        the result, and the rows of the sheet.

    Raises:
        FileNotFoundError: if base, decoder, features or images are missing.
        ValueError: if the decoder does not fit the base, or an option is off.
    """
    if options.images < 1:
        raise ValueError(f"--images is a number of images, 1 or more, got {options.images}")
    device = torch.device(options.device)
    family = family_at(options.base)
    tiny = fitting_tiny_vae(options.decoder, family)
    decoders = Decoders(family.load_vae().eval().to(device), tiny.eval().to(device), family.scaling_factor)
    network = features_from(options.features).load().eval().to(device)
    pictures = (
        toy_pictures(options.images)
        if options.source is None
        else folder_pictures(options.source, options.images, family.resolution)
    )
    tally, first, done = Tally(), None, 0
    with Progress(console=Console(stderr=True)) as progress, full_precision(device):
        task = progress.add_task("decoding", total=options.images)
        for real_uint8 in batches(pictures, options.batch_size):
            latents = tally.add(real_uint8.to(device), decoders, network, options.columns)
            first = latents if first is None else first
            done += len(latents)
            progress.advance(task, len(latents))
        assert first is not None
        sizes = sorted({1, len(first)})
        ratios = {str(size): time_ratio(decoders, first[:size]) for size in sizes}
    result = {
        "base": options.base,
        "vae_sha256": hash_weights(family.folder / "vae"),
        "decoder": options.decoder,
        "decoder_sha256": hash_weights(options.decoder),
        "images": done,
        "source": options.source or "toy world, test split",
        **tally.means(),
        "features": options.features,
        "parameters": decoders.parameters(),
        "time_kl_over_tiny": ratios,
        **where(device),
    }
    return result, tally.shown


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.decoder",
        description="Compare a tiny decoder with its base's own on the latents of real images: PSNR, distance of frozen "
        "features, decoding time (a ratio, measured alternately), and a sheet of images beside the JSON file.",
        epilog="example: python -m evaluation.decoder --base data/toy/base --decoder outputs/toy-decoder/decoder "
        "--out decoder.json",
    )
    parser.add_argument("--base", required=True, help="diffusers folder of the base")
    parser.add_argument(
        "--decoder", required=True, help="AutoencoderTiny folder, or a pipeline's that has one"
    )
    parser.add_argument("--out", type=Path, help="JSON file to write; the sheet goes beside it as .png")
    parser.add_argument("--images", type=int, default=500, help="default: %(default)s")
    parser.add_argument(
        "--source", help="folder of images; without it the test split of the toy world is rendered"
    )
    parser.add_argument(
        "--features",
        default=TOY_FEATURES,
        help="network of the feature distance: open_clip:FOLDER:LAYERS, dinov2:FOLDER:LAYERS or timm:NAME:FILE:LAYERS "
        "(default: %(default)s)",
    )
    parser.add_argument("--batch_size", type=int, default=50, help="default: %(default)s")
    parser.add_argument("--columns", type=int, default=8, help="images on the sheet (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    options = parser.parse_args(arguments)
    try:
        result, rows = evaluate(options)
        if options.out is not None:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(result, indent=2) + "\n")
            count = len(next(iter(rows.values())))
            picture = sheet(rows, [""] * count)
            picture.save(options.out.with_suffix(".png"), optimize=True)
    except (FileNotFoundError, PermissionError, ValueError) as error:
        sys.exit(f"decoder: {error}")
    shown = ("psnr_db", "psnr_loss_db", "feature_distance", "parameters", "time_kl_over_tiny", "images")
    Console().print_json(data={key: result[key] for key in shown})


if __name__ == "__main__":
    main()
