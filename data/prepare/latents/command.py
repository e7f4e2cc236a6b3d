"""`python -m data.prepare latents`: shards of images to shards of VAE latents."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Mapping
from pathlib import Path

from data.prepare.common.machine import choose_device, default_processes
from data.prepare.common.processes import run_all
from data.prepare.common.progress import ProgressBar
from data.prepare.common.remote import Reach
from data.prepare.common.settings_file import begin, write_json
from data.prepare.common.shard_files import missing
from data.prepare.common.shard_summary import SUMMARY_FILE, summarise
from data.prepare.common.subcommand import Subcommand
from data.prepare.latents.job import LatentJob
from data.prepare.latents.options import EXAMPLES, add_arguments
from data.prepare.latents.settings import NAMES_ONLY, SETTINGS_FILE, LatentSettings, fingerprint
from data.prepare.latents.vae import check_dtype, find_vae, pixels_per_latent
from data.shards.buckets import Buckets, Size
from data.shards.index import ShardSet
from sdxs_lightning.core.errors import UserError
from sdxs_lightning.families import Family
from sdxs_lightning.families.detect import detect_family

_STEPS_PER_SIDE = 16  # 64 pixels of SDXL's 1024


def run(options: argparse.Namespace) -> str:
    """Makes what is missing of a set, and accounts for it.

    Raises:
        UserError: for an input that cannot be used.
        CheckpointNotWritten: where the disk does not take a shard.
        Interrupted: after Ctrl-C.
    """
    try:
        family = detect_family(options.model, options.config)
    except (OSError, ValueError) as error:
        raise UserError(f"--model: {error}") from error
    vae_folder = find_vae(family, options.vae)
    check_dtype(vae_folder, options.vae_dtype)
    reach = Reach.of(options)
    try:
        source = reach.open(options.source)
    except (OSError, ValueError) as error:
        raise UserError(f"--from '{options.source}': {error}") from error
    sizes = _sizes(options, family, pixels_per_latent(vae_folder))
    settings = _settings(options, source, vae_folder, sizes)
    device = choose_device(options.device)
    processes = options.processes or default_processes(device)
    begin(options.out, SETTINGS_FILE, settings, NAMES_ONLY)
    job = LatentJob(settings, options.out, vae_folder, options.bad_samples, device, processes, reach)
    part, parts = options.part
    to_make = missing(options.out, settings.shards, part, parts)
    started = time.monotonic()
    progress = ProgressBar(sum(source.sizes[shard] for shard in to_make), "latents")
    run_all(job, to_make, progress)
    seconds = time.monotonic() - started
    told, summary = summarise(options.out, settings.shards, settings, progress.total, seconds)
    if not summary:
        return told
    numbers = statistics(summary["sums"], family)
    write_json(options.out / SUMMARY_FILE, summary | numbers)
    return (
        f"{told}; scaled latents of mean {numbers['latents_mean']:.3f} and standard deviation "
        f"{numbers['latents_std']:.3f}"
    )


def statistics(sums: Mapping[str, float], family: Family) -> dict[str, float]:
    """Mean and standard deviation of all scaled latents; about 0 and 1 for pictures like those of the VAE's training.

    Args:
        sums: `values`, `latents` and `squares` over the set.
        family: the base, which says how latents are scaled.
    """
    mean = sums["latents"] / sums["values"]
    variance = max(sums["squares"] / sums["values"] - mean * mean, 0.0)
    return {
        "latents_mean": (mean - family.shift_factor) * family.scaling_factor,
        "latents_std": math.sqrt(variance) * family.scaling_factor,
    }


def _sizes(options: argparse.Namespace, family: Family, factor: int) -> list[Size]:
    if options.sizes:
        sizes = list(dict.fromkeys(options.sizes))
    elif options.buckets is not None:
        side = options.buckets or family.resolution
        try:
            sizes = Buckets(side, max(side // _STEPS_PER_SIDE, factor)).sizes()
        except ValueError as error:
            raise UserError(f"--buckets: {error}") from error
    else:
        sizes = [(options.resolution or family.resolution,) * 2]
    for height, width in sizes:
        if height % factor or width % factor:
            raise UserError(
                f"a size of {height}x{width} pixels is no multiple of {factor}, the pixels of one latent; change --sizes, "
                "--buckets or --resolution."
            )
    return sizes


def _settings(
    options: argparse.Namespace, source: ShardSet, vae_folder: Path, sizes: list[Size]
) -> LatentSettings:
    return LatentSettings(
        source=options.source,
        model=options.model,
        config=options.config,
        vae=options.vae,
        source_fingerprint=source.fingerprint,
        vae_fingerprint=fingerprint(vae_folder),
        shards=len(source.shards),
        sizes=[list(size) for size in sizes],
        dtype=options.dtype,
        store=options.store,
        vae_dtype=options.vae_dtype,
        batch_size=options.batch_size,
    )


LATENTS = Subcommand(
    "latents",
    "Encode shards of images to shards of latents by the VAE of a base.",
    EXAMPLES,
    add_arguments,
    run,
)
