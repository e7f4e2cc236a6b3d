"""`python -m data.prepare pairs`: (noise seed, prompt, latents) of a target sampler, as shards that trainings read."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from typing import Any

from data.prepare.common.checksums import SUMS_FILE, sums_content
from data.prepare.common.machine import choose_device, device_of, same_bits
from data.prepare.common.set_folder import LocalFolder, SetFolder
from data.prepare.common.settings_file import begin_or_resume
from data.prepare.common.shard_files import SUMMARY_FILE, stats_name, summarise_once, tar_name
from data.prepare.common.shared_work import SetProgress, workforce
from data.prepare.pairs.check import open_pairs, pair_statistics, shards_for_statistics, verify_pairs
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
    prompts, folder = open_prompts(options.captions), options.output
    with workforce(options) as workers:
        pair_set, family = _pair_set(options, prompts, workers.device)
        _check_room(options, pair_set, family)
        begin_or_resume(folder, SETTINGS_FILE, pair_set.settings, NAMES_ONLY)
        before = folder.read(SUMMARY_FILE)
        shards = missing_pair_shards(folder, pair_set, options.part)
        started = time.monotonic()
        progress = SetProgress({shard: len(pair_set.indices(shard)) for shard in shards}, "pairs")
        workers.make(PairJob(pair_set, folder, options.batch_size, workers.device), shards, progress)
    seconds = time.monotonic() - started
    done = f"{progress.read} pairs sampled in {seconds:.1f} s"
    checked: dict[str, Any] = {}
    if options.verify:
        device = workers.device if options.ray is None else choose_device("auto")
        with same_bits(device):
            sampler = PairSampler(pair_set, prompts, device_of(device, 0))
            checked = verify_pairs(folder, sampler, options.batch_size, options.verify)
        done += f"; {len(checked['verified'])} sampled again, largest difference "
        done += f"{checked['largest_difference']:.3g}"
        before = folder.read(SUMMARY_FILE)  # another command's summary lacks what was verified
    made = {"made": progress.read, "seconds": seconds, **checked}
    summary = summarise_once(folder, before, lambda: _summarise(folder, pair_set, family, made))
    if not summary:
        waiting = len(missing_pair_shards(folder, pair_set))
        return f"{done}; {waiting} of {pair_set.shards} shards in {folder} wait for the other parts"
    return (
        f"{done}; {folder} holds {summary['pairs']} pairs in {pair_set.shards} shards, scaled latents of mean "
        f"{summary['latents_mean']:.3f} and standard deviation {summary['latents_std']:.3f}"
    )


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
        raise UserError(str(error)) from error
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
    """Before the shards are listed: a set that cannot be meant has millions of them. What a URL has room for is not known."""
    folder = options.output
    if isinstance(folder, LocalFolder):
        check_room(
            folder.path,
            -(-pair_set.count // options.part.parts),
            least_pair_bytes(family.latent_shape()),
            "--count",
            "pairs",
            present=sum(size for name, size in folder.names().items() if name.endswith(".tar")),
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
    folder: SetFolder, pair_set: PairSet, family: Family, made: Mapping[str, Any]
) -> dict[str, Any]:
    """Writes SHA256SUMS and returns the content of summary.json; {} if shards are still missing."""
    if missing_pair_shards(folder, pair_set):
        return {}
    dataset = open_pairs(folder, pair_set, shards_for_statistics(folder, pair_set))
    folder.remove_abandoned()
    sums = {tar_name(shard): _sha256(folder, shard) for shard in range(pair_set.shards)}
    folder.write(SUMS_FILE, sums_content(sums).encode())
    return {
        "pairs": pair_set.count,
        "shards": pair_set.shards,
        **pair_statistics(dataset, family),
        **made,
        "settings": pair_set.settings,
    }


def _sha256(folder: SetFolder, shard: int) -> str:
    """Of a shard's tar, as its statistics say; sets of earlier versions have none."""
    content = folder.read(stats_name(shard))
    if content is not None:
        return str(json.loads(content)["sha256"])
    return hashlib.sha256(folder.read(tar_name(shard)) or b"").hexdigest()
