"""`python -m data.prepare pairs`: (noise seed, prompt, latents) of a target sampler, as shards that trainings read."""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data.prepare.common.machine import choose_device, default_processes, device_of, same_bits
from data.prepare.common.processes import run_all
from data.prepare.common.progress import ProgressBar
from data.prepare.common.settings_file import write_json
from data.prepare.common.subcommand import Subcommand
from data.prepare.pairs.check import open_set, statistics, verify
from data.prepare.pairs.options import DDIM, EXAMPLES, add_arguments
from data.prepare.pairs.processes import PairJob
from data.prepare.pairs.prompts import Prompts, open_prompts
from data.prepare.pairs.sampler import PairSampler
from data.prepare.pairs.settings import PairSettings, begin, fingerprint
from data.prepare.pairs.shards import missing, tidy
from sdxs_lightning.core.errors import UserError
from sdxs_lightning.core.timesteps import few_step_timesteps
from sdxs_lightning.families import Family
from sdxs_lightning.families.detect import detect_family
from sdxs_lightning.pairs.scheduler_sampler import scheduler_config

SUMMARY_FILE = "summary.json"


def run(options: argparse.Namespace) -> str:
    """Makes what is missing of a set, and checks it.

    Raises:
        UserError: for an input that cannot be used, or a set that does not hold what it should.
        CheckpointNotWritten: where the disk does not take a shard.
        Interrupted: after Ctrl-C.
    """
    part, parts = options.part
    prompts = open_prompts(options.captions)
    settings, family = _settings(options, prompts)
    job = _job(options, settings)
    begin(options.out, settings)
    to_make = missing(options.out, settings, part, parts)
    started = time.monotonic()
    progress = ProgressBar(sum(len(settings.indices(shard)) for shard in to_make), "pairs")
    run_all(job, to_make, progress)
    seconds = time.monotonic() - started
    checked: dict[str, Any] = {}
    if options.verify:
        with same_bits(job.device):
            sampler = PairSampler(settings, prompts, device_of(job.device, 0))
            checked = verify(options.out, sampler, job.batch_size, options.verify)
    return _told(options.out, settings, family, progress.total, seconds, checked)


def _told(
    folder: Path, settings: PairSettings, family: Family, made: int, seconds: float, checked: dict[str, Any]
) -> str:
    """Writes the summary of a set that is complete, and says in words what there is."""
    verified = (
        f"; {len(checked['verified'])} sampled again, largest difference {checked['largest_difference']:.3g}"
        if checked
        else ""
    )
    done = f"{made} pairs made in {seconds:.1f} s{verified}"
    waiting = len(missing(folder, settings))
    if waiting:
        return f"{done}; {waiting} of {settings.shards} shards in {folder} wait for the other parts"
    dataset = open_set(folder, settings)
    tidy(folder)
    numbers = statistics(dataset, family)
    summary = {"pairs": len(dataset), "shards": settings.shards, **numbers, "made": made, "seconds": seconds}
    write_json(folder / SUMMARY_FILE, {**summary, **checked, "settings": asdict(settings)})
    return (
        f"{done}; {folder} holds {len(dataset)} pairs in {settings.shards} shards, scaled latents of mean "
        f"{numbers['latents_mean']:.3f} and standard deviation {numbers['latents_std']:.3f}"
    )


def _settings(options: argparse.Namespace, prompts: Prompts) -> tuple[PairSettings, Family]:
    count = prompts.size if options.count is None else options.count
    if count is None:
        raise UserError(f"--count is needed with --captions {options.captions}, which has no end.")
    try:
        family = detect_family(options.model, options.config)
    except (OSError, ValueError) as error:
        raise UserError(f"--model: {error}") from error
    scheduler = None if options.scheduler == DDIM else options.scheduler
    _check_sampler(options, scheduler, family)
    try:
        model_fingerprint = fingerprint(family, options.unet)
    except (OSError, ValueError) as error:
        raise UserError(f"--unet: {error}") from error
    settings = PairSettings(
        model=options.model,
        unet=options.unet,
        config=options.config,
        captions=options.captions,
        model_fingerprint=model_fingerprint,
        captions_fingerprint=prompts.fingerprint,
        pipeline_class=family.pipeline_class,
        resolution=family.resolution,
        count=count,
        samples_per_shard=options.samples_per_shard,
        steps=options.steps,
        guidance=options.guidance,
        scheduler=scheduler,
        spacing=options.spacing,
        seed=options.seed,
        dtype=options.dtype or ("float32" if choose_device(options.device) == "cpu" else "bfloat16"),
    )
    return settings, family


def _check_sampler(options: argparse.Namespace, scheduler: str | None, family: Family) -> None:
    """Before any weights are loaded."""
    try:
        few_step_timesteps(options.steps, family.schedule.num_train_timesteps, options.spacing, 1)
    except ValueError as error:
        raise UserError(f"--steps: {error}") from error
    if scheduler is None:
        return
    try:
        scheduler_config(scheduler, family.schedule, family.prediction_type, options.spacing, 1)
    except ValueError as error:
        raise UserError(f"--scheduler: {error}") from error


def _job(options: argparse.Namespace, settings: PairSettings) -> PairJob:
    device = choose_device(options.device)
    processes = options.processes or default_processes(device)
    return PairJob(settings, options.out, options.batch_size, device, processes)


PAIRS = Subcommand(
    "pairs",
    "Sample (noise, latents) pairs of a base or few-step model, for a warm-up or for feature matching.",
    EXAMPLES,
    add_arguments,
    run,
)
