"""Score a model folder: `python -m evaluation.evaluate --model outputs/quickstart/pipeline --protocol toy --out FILE.json`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from evaluation.machine import milliseconds_per_image, where
from evaluation.protocols import PROTOCOLS, get_protocol, hash_weights
from evaluation.scores import Judges, measure
from sdxs_lightning.latents import to_uint8
from sdxs_lightning.seeding import Stream, normal


@dataclass(frozen=True)
class PipelineImages:
    """Images of a diffusers pipeline, from the noise that training-time measurements use too."""

    pipeline: Any
    """A text-to-image pipeline of Stable Diffusion's kind."""
    steps: int
    """Network calls."""
    guidance_scale: float
    """As diffusers counts it: 0 and 1 are none."""
    seed: int
    """Of the noise."""

    def __call__(self, captions: Sequence[str], sample_ids: Tensor) -> Tensor:
        """B captions and their numbers (B,) int64 to (B,3,H,W) uint8."""
        config = self.pipeline.unet.config
        shape = (config.in_channels, config.sample_size, config.sample_size)
        device = self.pipeline.device
        noise = normal(self.seed, Stream.EVALUATION, sample_ids.to(device), shape)
        images: Tensor = self.pipeline(
            prompt=list(captions),
            latents=noise.to(self.pipeline.unet.dtype),
            num_inference_steps=self.steps,
            guidance_scale=self.guidance_scale,
            # Of schedulers that draw noise between steps; the first noise is given.
            generator=[torch.Generator().manual_seed(number) for number in sample_ids.tolist()],
            output_type="pt",
        ).images
        return to_uint8(images.float() * 2 - 1)


def evaluate(
    model: str,
    protocol_name: str,
    steps: int,
    guidance_scale: float,
    samples: int | None,
    batch_size: int,
    device: str,
) -> dict[str, Any]:
    """Load, generate, score.

    Raises:
        FileNotFoundError: if there is no pipeline in the folder, or a judge is missing.
    """
    if not (Path(model) / "model_index.json").is_file():
        raise FileNotFoundError(
            f"no diffusers pipeline at {model} (model_index.json is missing); --model takes its folder"
        )
    protocol = get_protocol(protocol_name, samples=samples)
    judges = Judges.load(protocol)
    pipeline = DiffusionPipeline.from_pretrained(model, torch_dtype=torch.float32).to(device)
    pipeline.set_progress_bar_config(disable=True)
    maker = PipelineImages(pipeline, steps, guidance_scale, protocol.seed)
    prompts = protocol.captions()
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task(f"{protocol.name}: {model}", total=len(prompts))
        scores = measure(
            maker,
            prompts,
            judges,
            torch.device(device),
            batch_size,
            advance=lambda images: progress.advance(task, images),
        )
    return {
        "model": model,
        "model_sha256": hash_weights(model),
        "nfe": steps,
        "guidance_scale": guidance_scale,
        **scores.as_dict(),
        "samples": len(prompts),
        "ms_per_image": milliseconds_per_image(maker, prompts[0]),
        "protocol": protocol.describe(),
        **where(torch.device(device)),
    }


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.evaluate",
        description="FID, CLIP score and caption accuracy of a diffusers pipeline folder under a named protocol.",
        epilog="example: python -m evaluation.evaluate --model outputs/quickstart/pipeline --protocol toy --out student.json",
    )
    parser.add_argument("--model", required=True, help="diffusers pipeline folder")
    parser.add_argument("--protocol", default="toy", choices=list(PROTOCOLS), help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=1, help="default: %(default)s")
    parser.add_argument(
        "--guidance_scale", type=float, default=0.0, help="0 means none (default: %(default)s)"
    )
    parser.add_argument(
        "--samples", type=int, help="fewer than the protocol's, for a quick look; it changes FID"
    )
    parser.add_argument("--batch_size", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    try:
        settings = options.steps, options.guidance_scale, options.samples, options.batch_size, options.device
        result = evaluate(options.model, options.protocol, *settings)
        if options.out is not None:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(result, indent=2) + "\n")
    except (FileNotFoundError, PermissionError, ValueError) as error:
        sys.exit(f"evaluate: {error}")
    shown = ("fid", "clip_score", "caption_accuracy", "attribute_accuracy", "samples", "ms_per_image")
    Console().print_json(data={key: result[key] for key in shown})


if __name__ == "__main__":
    main()
