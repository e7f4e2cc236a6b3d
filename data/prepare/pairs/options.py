"""The options of `python -m data.prepare pairs`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from data.prepare.common.option_types import add_device, add_part, at_least
from sdxs_lightning.core.pair_noise import SEEDS
from sdxs_lightning.core.timesteps import Spacing
from sdxs_lightning.pairs.scheduler_sampler import ODE_SCHEDULERS

DDIM = "ddim"

EXAMPLES = f"""examples:
  python -m data.prepare pairs --model data/toy/base --captions toy:train --count 2048 --steps 15 --guidance 1.5 \\
      --out outputs/pairs
  python -m data.prepare pairs --model stabilityai/sd-turbo --captions prompts.txt --steps 1 --guidance 1 --out pairs/turbo
  python -m data.prepare pairs --model models/sdxl --captions 'laion/{{00000..00099}}.tar' --count 10000 --steps 25 \\
      --guidance 6 --scheduler DPMSolverMultistepScheduler --out pairs/sdxl --verify 4

A training reads them with data.shards pointing at --out, data.contents [latents, noise_seeds] and pairs.source batch.
The noise is never stored: it is made anew from each pair's seed. A run that was cut off goes on when the same command is
given again, on any number of processes, and the shards come out the same.

schedulers: {DDIM} (this project's own), {", ".join(ODE_SCHEDULERS)}
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds them to the parser of the command."""
    add = parser.add_argument
    add("--model", required=True, help="target sampler: diffusers folder, hub id or .safetensors file")
    add("--config", help="for a single file: folder or hub id of its configs and tokenizers")
    add("--unet", help="U-Net or pipeline folder or hub id in place of the model's own U-Net")
    add(
        "--captions",
        required=True,
        help="text file with a prompt a line, shards (folder, glob, pattern), or toy:train",
    )
    add("--count", type=at_least(1), help="number of pairs (default: one a prompt); prompts are used again")
    add("--out", type=Path, required=True, help="folder of the shards, made or gone on with")
    add("--steps", type=at_least(1), required=True, help="of the scheduler")
    add("--guidance", type=_guidance, required=True, help="guidance scale, 1 means none")
    add("--scheduler", default=DDIM, help="one of those below (default: %(default)s)")
    add(
        "--spacing",
        choices=get_args(Spacing),
        default="trailing",
        help="of the timesteps; trailing begins in pure noise, where a one-step student begins (default: %(default)s)",
    )
    add("--seed", type=_seed, default=0, help="of the noise (default: %(default)s)")
    add("--dtype", choices=["float32", "float16", "bfloat16"], help="default: bfloat16 on GPUs, else float32")
    add_device(add)
    add_part(add)
    add("--batch-size", type=at_least(1), default=16, help="pairs at once (default: %(default)s)")
    add(
        "--samples-per-shard",
        type=at_least(1),
        default=1024,
        help="also what an interruption may cost a process (default: %(default)s)",
    )
    add(
        "--verify",
        type=at_least(1),
        nargs="?",
        const=1,
        metavar="PAIRS",
        help="sample random pairs of the set again and compare",
    )


def _guidance(text: str) -> float:
    try:
        scale = float(text)
    except ValueError:
        scale = float("nan")
    # diffusers calls no guidance 0 for turbo models; here 0 would leave the prompt out.
    if not 1 <= scale < float("inf"):
        raise argparse.ArgumentTypeError(f"'{text}' is no guidance scale from 1 (none) on")
    return scale


def _seed(text: str) -> int:
    if not text.isdigit() or int(text) not in SEEDS:
        raise argparse.ArgumentTypeError(f"'{text}' is no seed, a whole number from 0 to {SEEDS[-1]}")
    return int(text)
