"""`python -m data.prepare images`: pictures with captions as shards that trainings read."""

from __future__ import annotations

import argparse
import time

from data.prepare.common.machine import choose_device, default_processes
from data.prepare.common.processes import run_all
from data.prepare.common.progress import ProgressBar
from data.prepare.common.remote import Reach
from data.prepare.common.settings_file import begin
from data.prepare.common.shard_files import missing
from data.prepare.common.shard_summary import summarise
from data.prepare.common.subcommand import Subcommand
from data.prepare.images.job import ImageJob
from data.prepare.images.named_condition import given_folder
from data.prepare.images.options import EXAMPLES, add_arguments
from data.prepare.images.preparing import PADDED, Preparer
from data.prepare.images.settings import NAMES_ONLY, SETTINGS_FILE, ImageSettings
from data.prepare.images.sources import Columns, FolderSource, open_source
from sdxs_lightning.core.errors import UserError


def run(options: argparse.Namespace) -> str:
    """Makes what is missing of a set, and accounts for it.

    Raises:
        UserError: for an input that cannot be used.
        CheckpointNotWritten: where the disk does not take a shard.
        Interrupted: after Ctrl-C.
    """
    settings = _settings(options)
    # A network that makes condition images runs on the GPUs; everything else here is work for a CPU.
    network = settings.condition is not None and settings.condition.startswith("depth:")
    device = choose_device(options.device) if network else "cpu"
    Preparer(settings)  # a condition that does not exist is refused before anything is made
    begin(options.out, SETTINGS_FILE, settings, NAMES_ONLY)
    processes = options.processes or default_processes(device)
    job = ImageJob(settings, options.out, device, processes, Reach.of(options))
    part, parts = options.part
    to_make = missing(options.out, settings.shards, part, parts)
    started = time.monotonic()
    progress = ProgressBar(sum(len(settings.indices(shard)) for shard in to_make), "images")
    run_all(job, to_make, progress)
    seconds = time.monotonic() - started
    told, summary = summarise(options.out, settings.shards, settings, progress.total, seconds)
    padded = int(summary.get("sums", {}).get(PADDED, 0))
    warning = "; {} have even bands around them: download with img2dataset's resize_mode keep_ratio instead of border"
    return told + (warning.format(padded) if padded else "")


def _settings(options: argparse.Namespace) -> ImageSettings:
    if options.crop != "none" and options.resolution is None:
        raise UserError(f"--crop {options.crop} needs --resolution, the side of the squares.")
    if options.min_caption > options.max_caption:
        raise UserError(
            f"--min-caption {options.min_caption} is above --max-caption {options.max_caption}; no caption fits."
        )
    source = open_source(
        options.source, Columns(options.image_column, options.caption_column), Reach.of(options)
    )
    if given_folder(options.condition) is not None and not isinstance(source, FolderSource):
        raise UserError(
            f"--condition {options.condition} finds its images by the paths of a folder of pictures, and --from is none; in "
            "tars they are members of the sample (cond.png)."
        )
    return ImageSettings(
        source=options.source,
        image_column=options.image_column,
        caption_column=options.caption_column,
        source_fingerprint=source.fingerprint,
        count=len(source),
        samples_per_shard=options.samples_per_shard,
        resolution=options.resolution,
        crop=options.crop,
        image_format=options.format,
        quality=options.quality,
        min_side=(options.resolution or 1) if options.min_side is None else options.min_side,
        max_aspect=options.max_aspect,
        min_caption=options.min_caption,
        max_caption=options.max_caption,
        condition=options.condition,
    )


IMAGES = Subcommand(
    "images",
    "Pack pictures with captions into shards: filtered, resized if wanted, original sizes kept.",
    EXAMPLES,
    add_arguments,
    run,
)
