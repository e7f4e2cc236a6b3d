"""The options of `python -m data.prepare latents`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from data.prepare.common.geometry import Size
from data.prepare.common.option_types import add_device, add_part, at_least
from data.prepare.common.remote import add_cache
from data.prepare.latents.settings import Store, StoredDtype, VaeDtype

EXAMPLES = """examples:
  python -m data.prepare latents --model models/sd15 --from datasets/photos --out datasets/photos-sd15
  python -m data.prepare latents --model models/sdxl --from datasets/photos --buckets --out datasets/photos-sdxl
  python -m data.prepare latents --model models/sdxl --vae madebyollin/sdxl-vae-fp16-fix --vae-dtype float16 \\
      --from 'laion/{00000..00999}.tar' --sizes 1024x1024 896x1152 1152x896 --batch-size 16 --out datasets/laion-sdxl

Each shard of --from becomes one of --out, with captions, condition images and json; original size and crop are in the json
for SDXL. A training reads them with data.contents [latents] or [latents, sizes]. Crops are frozen with the latents. A run
that was cut off goes on when the same command is given again, on any number of processes, and the shards come out the same.
`(cd OUT && sha256sum --check SHA256SUMS)` or `python -m data.prepare verify OUT` sees any byte that changed.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds them to the parser of the command."""
    add = parser.add_argument
    add("--model", required=True, help="base: diffusers folder, hub id or .safetensors file")
    add("--config", help="for a single file: folder or hub id of its configs and tokenizers")
    add("--vae", help="VAE or pipeline folder or hub id in place of the base's VAE, of the same latents")
    add("--from", dest="source", required=True, help="shards of images: folder, glob or brace pattern")
    add("--out", type=Path, required=True, help="folder of the shards, made or gone on with")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--resolution", type=at_least(1), help="side of the squares (default: the base's own)")
    size.add_argument(
        "--sizes",
        type=_size,
        nargs="+",
        metavar="HxW",
        help="a picture goes to the one of the nearest aspect",
    )
    size.add_argument(
        "--buckets",
        type=at_least(1),
        nargs="?",
        const=0,
        metavar="SIDE",
        help="sizes with the area of SIDE squared (default: the base's own) and aspects from about 1:2 to 2:1, in steps of a "
        "sixteenth of SIDE",
    )
    add("--dtype", choices=get_args(StoredDtype), default="float16", help="stored (default: %(default)s)")
    add(
        "--store",
        choices=get_args(Store),
        default="mean",
        help="mean+logvar doubles the bytes and also keeps the posterior's spread, for data.draw_latents "
        "(default: %(default)s)",
    )
    add(
        "--vae-dtype",
        choices=get_args(VaeDtype),
        default="float32",
        help="of the VAE; float16 only where it does not overflow (default: %(default)s)",
    )
    add("--batch-size", type=at_least(1), default=8, help="pictures at once (default: %(default)s)")
    add(
        "--bad-samples",
        type=_share,
        default=0.01,
        metavar="SHARE",
        help="of a shard that may be broken and is left out; more stops the command (default: %(default)s)",
    )
    add_cache(add)
    add_device(add)
    add_part(add)


def _size(text: str) -> Size:
    height, cross, width = text.partition("x")
    if not (cross and height.isdigit() and width.isdigit() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(f"'{text}' is no size in pixels; 1152x896 is a tall one")
    return int(height), int(width)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = float("nan")
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no share from 0 to 1")
    return share
