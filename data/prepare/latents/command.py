"""`python -m data.prepare latents`: shards of images to shards of VAE latents."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.prepare.common.raw_shards import open_shards
from data.prepare.common.settings_file import begin_or_resume
from data.prepare.common.shard_files import SUMMARY_FILE, describe, missing_shards, summarise, summarise_once
from data.prepare.common.shared_work import SetProgress, workforce
from data.prepare.latents.job import LatentJob, LatentSet
from data.prepare.latents.options import LatentOptions
from data.prepare.latents.vae import check_dtype, find_vae, pixels_per_latent
from data.shards.order.buckets import Buckets, Size
from sdxs_lightning.core.errors import UserError
from sdxs_lightning.families import Family
from sdxs_lightning.families.detect import detect_family

SETTINGS_FILE = "latents.json"
_NAMES_ONLY = ("source", "model", "config", "vae")
_STEPS_PER_SIDE = 16  # 64 pixels of SDXL's 1024


def run(options: LatentOptions) -> str:
    """Makes the missing shards of a set and summarises it.

    Raises:
        UserError: for an input that cannot be used.
        CheckpointNotWritten: if a shard cannot be written.
        Interrupted: after Ctrl-C.
    """
    try:
        family = detect_family(options.model, options.config)
    except (OSError, ValueError) as error:
        raise UserError(f"--model: {error}") from error
    vae_folder = find_vae(family, options.vae)
    check_dtype(vae_folder, options.vae_dtype)
    try:
        source = open_shards(options.source, options)
    except (OSError, ValueError) as error:
        raise UserError(f"--from '{options.source}': {error}") from error
    latent_set = LatentSet(
        options,
        source_fingerprint=source.fingerprint,
        vae_fingerprint=_folder_fingerprint(vae_folder),
        shards=len(source.shards),
        sizes=_sizes(options, family, pixels_per_latent(vae_folder)),
    )
    folder = options.output
    with workforce(options) as workers:
        begin_or_resume(folder, SETTINGS_FILE, latent_set.settings, _NAMES_ONLY)
        before = folder.read(SUMMARY_FILE)
        job = LatentJob(latent_set, folder, vae_folder, workers.device, workers.processes)
        shards = missing_shards(folder, latent_set.shards, options.part)
        started = time.monotonic()
        progress = SetProgress({shard: source.sizes[shard] for shard in shards}, "latents")
        workers.make(job, shards, progress)
    seconds = time.monotonic() - started

    def summarised() -> dict[str, Any]:
        found = summarise(folder, latent_set.shards, latent_set.settings, progress.read, seconds)
        return found | latent_statistics(found["sums"], family) if found else {}

    summary = summarise_once(folder, before, summarised)
    message = (
        f"{progress.read} samples read in {seconds:.1f} s; {describe(folder, latent_set.shards, summary)}"
    )
    if not summary:
        return message
    return (
        f"{message}; scaled latents of mean {summary['latents_mean']:.3f} and standard deviation "
        f"{summary['latents_std']:.3f}"
    )


def latent_statistics(sums: Mapping[str, float], family: Family) -> dict[str, float]:
    """Mean and standard deviation of all scaled latents; about 0 and 1 for images like those that the VAE was trained on.

    Args:
        sums: `values`, `latents` and `squares` over the set.
        family: the base, whose scale of latents applies.
    """
    mean = sums["latents"] / sums["values"]
    variance = max(sums["squares"] / sums["values"] - mean * mean, 0.0)
    return {
        "latents_mean": (mean - family.shift_factor) * family.scaling_factor,
        "latents_std": math.sqrt(variance) * family.scaling_factor,
    }


def _sizes(options: LatentOptions, family: Family, factor: int) -> tuple[Size, ...]:
    if options.sizes:
        sizes = list(dict.fromkeys(options.sizes))
    elif options.buckets is not None:
        side = options.buckets or family.resolution
        step = max(side // _STEPS_PER_SIDE, factor)
        try:
            sizes = Buckets(side, step).sizes()
        except ValueError as error:
            raise UserError(
                f"--buckets is {side}, but must be a multiple of its steps, {step} pixels."
            ) from error
    else:
        sizes = [(options.resolution or family.resolution,) * 2]
    for height, width in sizes:
        if height % factor or width % factor:
            raise UserError(
                f"a size of {height}x{width} pixels is not a multiple of {factor}, the pixels of one latent; change --sizes, "
                "--buckets or --resolution."
            )
    return tuple(sizes)


def _folder_fingerprint(folder: Path) -> str:
    """Hash of a network's config and weights; reads them once."""
    found = hashlib.sha256()
    for file in sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors")):
        found.update(file.name.encode())
        with file.open("rb") as stream:
            found.update(hashlib.file_digest(stream, "sha256").digest())
    return found.hexdigest()[:16]
