"""Measure a tiny decoder: `python -m evaluation.benchmarks.decoder_table --base DIR --decoder DIR --out FILE.json`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from data.toy.world import image_at
from evaluation.benchmarks.decoder_comparison import Decoders, Tally, time_ratio
from evaluation.images.image_sets import open_images
from evaluation.networks.network_features import full_precision
from evaluation.protocols.protocols import hash_weights
from evaluation.reports.grids import sheet
from evaluation.runner.machine import where
from sdxs_lightning.core.errors import UserError
from sdxs_lightning.export import fitting_tiny_vae
from sdxs_lightning.families.detect import detect_family
from sdxs_lightning.networks.image_features import (
    Dinov2Features,
    ImageFeatures,
    OpenClipFeatures,
    TimmFeatures,
)

TOY_FEATURES = "open_clip:data/toy/clip:0,1,2"


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


def toy_pictures(count: int) -> Iterator[Tensor]:
    """The toy world's test images, which trained nothing: (3, H, W) uint8."""
    for index in range(count):
        yield torch.from_numpy(image_at("test", index)).permute(2, 0, 1)


def stored_pictures(source: str, count: int, side_px: int) -> Iterator[Tensor]:
    """The first images of a folder, zip file or shards, cropped to a centred square and resized: (3, side, side) uint8.

    Raises:
        UserError: without images.
    """
    images = open_images(source)
    for number in range(min(count, len(images.names))):
        picture = ImageOps.fit(images.read(number), (side_px, side_px), Image.Resampling.LANCZOS)
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
    family = detect_family(options.base)
    tiny = fitting_tiny_vae(options.decoder, family)
    decoders = Decoders(family.load_vae().eval().to(device), tiny.eval().to(device), family)
    network = features_from(options.features).load().eval().to(device)
    pictures = (
        toy_pictures(options.images)
        if options.source is None
        else stored_pictures(options.source, options.images, family.resolution)
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
        prog="python -m evaluation.benchmarks.decoder_table",
        description="Compare a tiny decoder with its base's own on the latents of real images: PSNR, distance of frozen "
        "features, decoding time (a ratio, measured alternately), and a sheet of images beside the JSON file.",
        epilog="example: python -m evaluation.benchmarks.decoder_table --base data/toy/base --decoder outputs/toy-decoder/decoder "
        "--out decoder.json",
    )
    parser.add_argument("--base", required=True, help="diffusers folder of the base")
    parser.add_argument(
        "--decoder", required=True, help="AutoencoderTiny folder, or a pipeline's that has one"
    )
    parser.add_argument("--out", type=Path, help="JSON file to write; the sheet goes beside it as .png")
    parser.add_argument("--images", type=int, default=500, help="default: %(default)s")
    parser.add_argument(
        "--source",
        help="folder of images, .zip file or shards; without it the test split of the toy world is rendered",
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
    except (FileNotFoundError, PermissionError, UserError, ValueError) as error:
        sys.exit(f"decoder: {error}")
    shown = ("psnr_db", "psnr_loss_db", "feature_distance", "parameters", "time_kl_over_tiny", "images")
    Console().print_json(data={key: result[key] for key in shown})


if __name__ == "__main__":
    main()
