"""Does a toy base respond to original size and crop? `python -m evaluation.benchmarks.size_conditioning --out FILE.json`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from data.toy.original_sizes import MARGIN_PX
from data.toy.training.classifier import AttributeClassifier
from evaluation.images.generate import RealImages
from evaluation.protocols.protocols import Protocol, get_protocol, hash_weights
from evaluation.runner.machine import where
from evaluation.runner.teacher_scores import GUIDANCE_SCALE
from sdxs_lightning.core.latents import to_uint8
from sdxs_lightning.core.seeding import Stream, normal
from sdxs_lightning.families import Family
from sdxs_lightning.families.detect import detect_family
from sdxs_lightning.networks.denoiser import Denoiser
from sdxs_lightning.pairs.target_sampler import TargetSampler


def sharpness(images_uint8: Tensor) -> float:
    """Mean absolute difference of neighbouring pixels, over both directions: halving and doubling a picture lowers it.

    Args:
        images_uint8: (B, 3, H, W).
    """
    images = images_uint8.float()
    return float((images.diff(dim=-1).abs().mean() + images.diff(dim=-2).abs().mean()) / 2)


@torch.no_grad()
def draw(
    family: Family,
    sampler: TargetSampler,
    protocol: Protocol,
    batch_size: int,
    size_px: int,
    crop_px: int,
    told: str,
) -> Tensor:
    """The protocol's images, from its noise, told an original size and a crop: (B, 3, H, W) uint8."""
    images, prompts = [], protocol.captions()
    for start in track(range(0, len(prompts), batch_size), description=f"told {told}"):
        texts = prompts[start : start + batch_size]
        numbers = torch.arange(start, start + len(texts))
        noise = normal(protocol.seed, Stream.EVALUATION, numbers, family.latent_shape())
        sizes = torch.full((len(texts), 2), size_px)
        crops = torch.full((len(texts), 2), crop_px)
        latents = sampler(noise, family.encode_prompts(texts, sizes, crops))
        images.append(to_uint8(family.decode(latents)))
    return torch.cat(images)


def measure_conditioning(base: str, protocol: Protocol, steps: int, batch_size: int) -> dict[str, Any]:
    """Sharpness and caption accuracy of the same prompts and noise under three tellings, and of real pictures."""
    family = detect_family(base)
    if family.encode_prompts([""]).add_time_ids is None:
        raise ValueError(
            f"'{base}' is not conditioned on sizes (its prompts have no add_time_ids); give a base that is."
        )
    unet = family.load_unet().eval().requires_grad_(False)
    sampler = TargetSampler(Denoiser(unet, family.schedule, family.prediction_type), steps, GUIDANCE_SCALE)
    side = family.resolution
    images_of = partial(draw, family, sampler, protocol, batch_size)
    tellings = {"plain": (side, 0), "half_size": (side // 2, 0), "cropped": (side, MARGIN_PX)}
    classifier = AttributeClassifier.from_pretrained(protocol.path(protocol.classifier))
    prompts, rows = protocol.captions(), {}
    drawn = {name: images_of(*telling, told=name) for name, telling in tellings.items()}
    real = RealImages(protocol.split)([], torch.arange(len(prompts)))
    for name, images in (drawn | {"real": real}).items():
        right = classifier.right(images, prompts).all(dim=1).float().mean()
        rows[name] = {"sharpness": sharpness(images), "caption_accuracy": float(right)}
    return {"base_sha256": hash_weights(base), "steps": steps, "guidance_scale": GUIDANCE_SCALE, "rows": rows}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.benchmarks.size_conditioning",
        description="Sharpness of what a base draws when told full size, half size, or a crop.",
        epilog="example: python -m evaluation.benchmarks.size_conditioning --base outputs/toy-sdxl-base --out sizes.json",
    )
    parser.add_argument("--base", default="outputs/toy-sdxl-base", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=25, help="of the sampler (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=200, help="default: %(default)s")
    parser.add_argument("--batch_size", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    try:
        protocol = get_protocol("toy", samples=options.samples)
        result = measure_conditioning(options.base, protocol, options.steps, options.batch_size)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"size_conditioning: {error}")
    if options.out is not None:
        result |= {"protocol": protocol.describe(), **where(torch.device("cpu"))}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=2) + "\n")
    Console().print_json(data=result["rows"])


if __name__ == "__main__":
    main()
