"""`python -m data.prepare pairs`: (noise seed, prompt, latents) of a target sampler, as shards that trainings read."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from data.prepare.common.machine import choose_device, default_processes, device_of, same_bits
from data.prepare.common.processes import run_all
from data.prepare.common.progress import CommandProgress
from data.prepare.common.settings_file import begin_or_resume, write_json
from data.prepare.common.shard_files import SUMMARY_FILE, remove_unfinished
from data.prepare.pairs.check import open_pairs, pair_statistics, verify_pairs
from data.prepare.pairs.job import PairJob, least_pair_bytes, missing_pair_shards
from data.prepare.pairs.options import DDIM, PairOptions
from data.prepare.pairs.pair_set import NAMES_ONLY, SETTINGS_FILE, PairSet, model_fingerprint
from data.prepare.pairs.prompts import Prompts, open_prompts
from data.prepare.pairs.sampler import PairSampler
from sdxs_lightning.core.disk_room import check_room
from sdxs_lightning.core.errors import UserError
from sdxs_lightning.core.timesteps import few_step_timesteps
from sdxs_lightning.families import Family
from sdxs_lightning.families.detect import detect_family
from sdxs_lightning.pairs.scheduler_sampler import scheduler_config


def run(options: PairOptions) -> str:
    """Writes the missing shards of a set, and checks it.

    Raises:
        UserError: for an input that cannot be used, or a set that does not hold what it should.
        CheckpointNotWritten: if a shard cannot be written.
        Interrupted: after Ctrl-C.
    """
    prompts = open_prompts(options.captions)
    device = choose_device(options.device)
    pair_set, family = _pair_set(options, prompts, device)
    _check_room(options, pair_set, family)
    processes = options.processes or default_processes(device)
    job = PairJob(pair_set, options.out, options.batch_size, device, processes)
    begin_or_resume(options.out, SETTINGS_FILE, pair_set.settings, NAMES_ONLY)
    shards = missing_pair_shards(options.out, pair_set, options.part)
    started = time.monotonic()
    progress = CommandProgress(sum(len(pair_set.indices(shard)) for shard in shards), "pairs")
    run_all(job, shards, progress)
    seconds = time.monotonic() - started
    checked: dict[str, Any] = {}
    if options.verify:
        with same_bits(device):
            sampler = PairSampler(pair_set, prompts, device_of(device, 0))
            checked = verify_pairs(options.out, sampler, options.batch_size, options.verify)
    return _summarise(options, pair_set, family, progress.total, seconds, checked)


def _pair_set(options: PairOptions, prompts: Prompts, device: str) -> tuple[PairSet, Family]:
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
        fingerprint = model_fingerprint(family, options.unet)
    except (OSError, ValueError) as error:
        raise UserError(f"--unet: {error}") from error
    pair_set = PairSet(
        model=options.model,
        unet=options.unet,
        config=options.config,
        captions=options.captions,
        model_fingerprint=fingerprint,
        captions_fingerprint=prompts.fingerprint,
        pipeline_class=family.pipeline_class,
        resolution=family.resolution,
        count=count,
        samples_per_shard=options.samples_per_shard,
        steps=options.steps,
        guidance=options.guidance_scale,
        scheduler=scheduler,
        spacing=options.spacing,
        seed=options.seed,
        dtype=options.dtype or ("float32" if device == "cpu" else "bfloat16"),
    )
    return pair_set, family


def _check_room(options: PairOptions, pair_set: PairSet, family: Family) -> None:
    """Before the shards are listed: a set that cannot be meant has millions of them."""
    folder = Path(options.out)
    tars = list(folder.glob("[0-9]*.tar"))
    check_room(
        folder,
        -(-pair_set.count // options.part.parts),
        least_pair_bytes(family.latent_shape()),
        "--count",
        "pairs",
        present=sum(path.stat().st_size for path in tars),
    )


def _check_sampler(options: PairOptions, scheduler: str | None, family: Family) -> None:
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


def _summarise(
    options: PairOptions,
    pair_set: PairSet,
    family: Family,
    sampled: int,
    seconds: float,
    checked: dict[str, Any],
) -> str:
    """Writes the summary of a complete set; returns a message for the user."""
    folder = options.out
    done = f"{sampled} pairs sampled in {seconds:.1f} s"
    if checked:
        verified, difference = len(checked["verified"]), checked["largest_difference"]
        done += f"; {verified} sampled again, largest difference {difference:.3g}"
    waiting = len(missing_pair_shards(folder, pair_set))
    if waiting:
        return f"{done}; {waiting} of {pair_set.shards} shards in {folder} wait for the other parts"
    dataset = open_pairs(folder, pair_set)
    remove_unfinished(folder)
    statistics = pair_statistics(dataset, family)
    summary = {
        "pairs": len(dataset),
        "shards": pair_set.shards,
        **statistics,
        "made": sampled,
        "seconds": seconds,
    }
    write_json(folder / SUMMARY_FILE, {**summary, **checked, "settings": pair_set.settings})
    return (
        f"{done}; {folder} holds {len(dataset)} pairs in {pair_set.shards} shards, scaled latents of mean "
        f"{statistics['latents_mean']:.3f} and standard deviation {statistics['latents_std']:.3f}"
    )
