"""Scores the toy world's models: students of the recipes, replaced U-Nets, the base in many and few steps."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DiffusionPipeline
from PIL.Image import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from evaluation.benchmarks.tables.recipe_runs import (
    RECIPES,
    is_finished,
    make_pairs,
    reads_pairs,
    run_folder,
    total_cpu_seconds,
    train_recipe,
)
from evaluation.benchmarks.tables.score_files import KeptRows, named_folders, write_scores
from evaluation.images.generate import ImageMaker, RealImages
from evaluation.images.samples import PipelineImages
from evaluation.metrics.diversity import diversity
from evaluation.protocols.protocols import Protocol, get_protocol
from evaluation.reports.cost_curves import cost_curves
from evaluation.reports.grids import sheet
from evaluation.reports.markdown import score_file_markdown, spread
from evaluation.reports.result_file import check_writable, read_result, write_result
from evaluation.runner.machine import milliseconds_per_image, where
from evaluation.runner.scores import ProtocolNetworks, score_images
from evaluation.runner.teacher_scores import Teacher, add_timings, look_up, measure_missing, store
from evaluation.user_errors import as_user_errors
from sdxs_lightning.core.model_hash import hash_weights
from sdxs_lightning.families.detect import detect_family
from sdxs_lightning.families.sd import StableDiffusion
from sdxs_lightning.inference.generator import torch_device
from sdxs_lightning.networks.denoiser import Denoiser

if TYPE_CHECKING:
    from evaluation.benchmarks.tables.options import Measuring, RecipesOptions, TeacherOptions, UNetsOptions

DIVERSITY_PROMPTS, SHEET_COLUMNS = 50, 10
SUMMARISED = (
    "shape_score",
    "clean_images",
    "fid",
    "clip_score",
    "caption_accuracy",
    "attribute_accuracy",
    "diversity",
    "cpu_seconds",
)


class Scorer:
    """Scores images under a protocol with a progress bar; loads the protocol's networks once."""

    def __init__(self, protocol: Protocol, options: Measuring) -> None:
        self.protocol, self.batch_size = protocol, options.batch_size
        self.networks, self.device = ProtocolNetworks.load(protocol), torch_device(options.device)

    def __call__(self, label: str, maker: ImageMaker, prompts: Sequence[str]) -> dict[str, float]:
        """Scores one image per prompt."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task(f"{self.protocol.name}: {label}", total=len(prompts))
            scores = score_images(
                maker,
                prompts,
                self.networks,
                self.device,
                self.batch_size,
                advance=lambda images: progress.advance(task, images),
            )
        return scores.as_dict()


@as_user_errors()
def recipes(options: RecipesOptions) -> str:
    """Train missing runs, score every student, and summarise over seeds."""
    for path in (options.out, options.sheet, options.curves):
        if path is not None:
            check_writable(path)
    protocol = get_protocol(options.protocol, samples=options.samples)
    scorer = Scorer(protocol, options)
    rows: dict[str, dict[int, dict[str, Any]]] = {row: {} for row in options.rows or RECIPES}
    if not options.finished_only and any(map(reads_pairs, rows)):
        make_pairs()
    for seed in options.seeds:
        for row in rows:
            if options.finished_only and not is_finished(options.root, row, seed):
                continue
            train_recipe(options.root, row, seed)
            cost = total_cpu_seconds(options.root, row, seed)
            rows[row][seed] = student_scores(options.root, row, seed, scorer) | {"cpu_seconds": cost}
            sys.stderr.write(f"{row}, seed {seed}: {rows[row][seed]}\n")
    summary = {row: over_seeds(by_seed) for row, by_seed in rows.items() if by_seed}
    if not summary:
        raise ValueError(f"none of these rows has finished with these seeds under {options.root}")
    content = {"rows": summary, "protocol": protocol.describe(), **where(scorer.device)}
    table = write_scores(options.out, content)
    if options.curves is not None:
        cost_curves(summary, options.curves)
    if options.sheet is not None:
        recipes_sheet(options.root, list(summary), options.seeds[0], protocol).save(options.sheet)
    return table


def student_scores(root: Path, row: str, seed: int, scorer: Scorer) -> dict[str, Any]:
    """Scores of an exported student in one step, cached in the run's folder."""
    folder, protocol = run_folder(root, row, seed), scorer.protocol
    kept = folder / f"scores_{protocol.name}.json"
    key = {"model_sha256": hash_weights(folder / "pipeline"), "fingerprint": protocol.fingerprint()}
    if kept.is_file():
        stored = read_result(kept)
        if {name: stored.get(name) for name in key} == key:
            return stored
    maker, prompts = student_images(folder / "pipeline", protocol, scorer.device), protocol.captions()
    result = {
        **scorer(f"{row}, seed {seed}", maker, prompts),
        "diversity": diversity(maker, prompts[:DIVERSITY_PROMPTS], scorer.networks.clip),
        "parameters": sum(parameter.numel() for parameter in maker.pipeline.unet.parameters()),
        **key,
    }
    write_result(kept, result)
    return result


def student_images(folder: Path, protocol: Protocol, device: torch.device) -> PipelineImages:
    """Generates images in one step with an exported pipeline."""
    pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return PipelineImages(pipeline, steps=1, guidance_scale=1.0, seed=protocol.seed)


def over_seeds(by_seed: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Table row: spread over seeds, and the values by seed (None if not recorded)."""
    summary: dict[str, Any] = {
        "seeds": list(by_seed),
        "parameters": next(iter(by_seed.values()))["parameters"],
    }
    for key in SUMMARISED:
        values = [scores.get(key) for scores in by_seed.values()]  # None: not measured
        known = [value for value in values if value is not None]
        summary[key] = spread(known) | {"values": values} if known else None
    return summary


def recipes_sheet(root: Path, rows: Sequence[str], seed: int, protocol: Protocol) -> Image:
    """The protocol's first prompts: real images, the base in 25 steps and in one, then each row."""
    cpu = torch.device("cpu")
    prompts, numbers = protocol.captions()[:SHEET_COLUMNS], torch.arange(SHEET_COLUMNS)
    base = Teacher(StableDiffusion("data/toy/base"), cpu, seed=protocol.seed)
    makers: dict[str, ImageMaker] = {"real": RealImages(protocol.split)}
    makers |= {"base\n25 steps": base.images(25), "base\n1 step": base.images(1)}
    images = {label: maker(prompts, numbers) for label, maker in makers.items()}
    for row in rows:
        maker = student_images(run_folder(root, row, seed) / "pipeline", protocol, cpu)
        images[row.replace("_", "\n").replace("+", "\n+")] = maker(prompts, numbers)
    return sheet(images, prompts)


@as_user_errors()
def unets(options: UNetsOptions) -> str:
    """Score each network at each number of steps; existing scores for the same weights are kept."""
    networks: dict[str, str | None] = {"base": None}
    networks |= named_folders("--unet", "kd=outputs/toy-miniaturise/unet", options.unet, networks)
    protocol, device = get_protocol(options.protocol, samples=options.samples), torch_device(options.device)
    family = detect_family(options.base).to(device)
    teacher = Teacher(family, device, options.guidance_scale, seed=protocol.seed)
    settings = {
        "base": options.base,
        "guidance_scale": options.guidance_scale,
        "protocol": protocol.describe(),
    }
    kept = KeptRows(options.out, settings, lambda rows: {**settings, "rows": rows, **where(device)})
    scorer, prompts = Scorer(protocol, options), protocol.captions()
    for name, path in networks.items():
        digest = hash_weights(path or family.folder / "unet")
        row = kept.known.get(name, {})
        scores = dict(row["steps"]) if row.get("unet_sha256") == digest else {}
        unet = family.load_unet(path, f"--unet {name}").eval().requires_grad_(False)
        denoiser = Denoiser(unet, family.schedule, family.prediction_type).to(device)
        for count in map(str, options.steps):
            maker = teacher.images(int(count), denoiser=denoiser)
            if count not in scores:
                scores[count] = scorer(f"{name}, {count} steps", maker, prompts)
            scores[count]["ms_per_image"] = milliseconds_per_image(maker, prompts[0])
        parameters = sum(parameter.numel() for parameter in unet.parameters())
        kept.add(name, {"unet": path, "unet_sha256": digest, "parameters": parameters, "steps": scores})
    return kept.finish()


@as_user_errors()
def teacher(options: TeacherOptions) -> str:
    """Score the base; existing scores for the same protocol and weights are kept."""
    check_writable(options.out)
    device, entries = torch_device(options.device), {}
    family = StableDiffusion(options.base).to(device)
    for name in options.protocol:
        protocol = get_protocol(name, samples=options.samples)
        base = Teacher(family, device, options.guidance_scale, options.spacing, protocol.seed)
        known = look_up([options.out], protocol, base)
        entry = measure_missing(
            known,
            protocol,
            base,
            options.steps,
            Scorer(protocol, options),
            keep=partial(store, options.out, name),
        )
        entries[name] = add_timings(entry, base, protocol.captions()[0])
        store(options.out, name, entries[name])
    return score_file_markdown(entries)
