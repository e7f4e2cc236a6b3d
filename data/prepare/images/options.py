"""The options of `python -m data.prepare images`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from data.prepare.common.option_types import add_device, add_part, at_least
from data.prepare.common.remote import add_cache
from data.prepare.images.image_files import ImageFormat
from data.prepare.images.named_condition import NAMES
from data.prepare.images.settings import Crop

EXAMPLES = """examples:
  python -m data.prepare images --from photos/ --out datasets/photos
  python -m data.prepare images --from photos/metadata.csv --image-column file_name --caption-column text \\
      --resolution 1024 --min-side 768 --max-aspect 2 --out datasets/photos-1024
  python -m data.prepare images --from 'laion/{00000..00999}.tar' --min-caption 10 --processes 16 --out datasets/laion
  python -m data.prepare images --from photos/ --condition canny --out datasets/photos-canny

--from is a folder of pictures (captions in files of the same name that end in txt, text, caption or json), a CSV, TSV or
parquet file, or tars as img2dataset writes them. JPEG, PNG and WebP files stay as they are, byte for byte, unless they are
resized or lie on their side. A run that was cut off goes on when the same command is given again, on any number of
processes, and the shards come out the same.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds them to the parser of the command."""
    add = parser.add_argument
    add("--from", dest="source", required=True, help="folder, CSV, TSV, parquet or tars; see below")
    add("--image-column", help="of a table: path, or the picture's bytes (default: a usual name)")
    add("--caption-column", help="of a table (default: a usual name)")
    add("--out", type=Path, required=True, help="folder of the shards, made or gone on with")
    add("--resolution", type=at_least(1), help="pixels of the shorter side (default: left as it is)")
    add(
        "--crop",
        choices=get_args(Crop),
        default="none",
        help="with --resolution: none keeps the aspect, centre makes squares (default: %(default)s)",
    )
    add(
        "--min-side",
        type=at_least(0),
        help="leave out pictures with a shorter side below this (default: --resolution, so that none is enlarged)",
    )
    add("--max-aspect", type=_aspect, default=4.0, help="longer by shorter side (default: %(default)s)")
    add(
        "--min-caption",
        type=at_least(0),
        default=1,
        help="characters; 0 keeps samples without a caption (default: %(default)s)",
    )
    add("--max-caption", type=at_least(0), default=10_000, help="characters (default: %(default)s)")
    add("--condition", help=f"also write condition images: {NAMES}")
    add(
        "--format",
        choices=get_args(ImageFormat),
        default="jpg",
        help="of pictures that do not stay as they are (default: %(default)s)",
    )
    add("--quality", type=_quality, default=95, help="of jpg and webp (default: %(default)s)")
    add("--samples-per-shard", type=at_least(1), default=10_000, help="read for each (default: %(default)s)")
    add_cache(add)
    add_device(add)
    add_part(add)


def _aspect(text: str) -> float:
    try:
        aspect = float(text)
    except ValueError:
        aspect = float("nan")
    if not aspect >= 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no ratio of the longer side to the shorter, 1 or more")
    return aspect


def _quality(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 100:
        raise argparse.ArgumentTypeError(f"'{text}' is no quality from 1 to 100")
    return int(text)
