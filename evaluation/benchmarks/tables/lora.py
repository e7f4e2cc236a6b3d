"""Scores style LoRAs of one-step students on the toy world: style, caption accuracy and diversity, by scale and seed."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from data.toy.rendered import render_captions
from data.toy.training.style_classifier import STYLES, StyleClassifier
from evaluation.benchmarks.tables.score_files import KeptRows, named_folders
from evaluation.benchmarks.tables.scores import SHEET_COLUMNS
from evaluation.images.generate import ImageMaker
from evaluation.images.samples import PipelineImages, load_pipeline, move_pipeline
from evaluation.metrics.caption_accuracy import CaptionAccuracy
from evaluation.metrics.diversity import diversity
from evaluation.metrics.estimates import share_estimate
from evaluation.protocols.protocols import Protocol, get_protocol
from evaluation.reports.grids import sheet
from evaluation.reports.markdown import spread
from evaluation.runner.machine import where
from evaluation.runner.scores import ProtocolNetworks
from evaluation.user_errors import as_user_errors
from sdxs_lightning.core.model_hash import hash_model, hash_weights
from sdxs_lightning.networks.lora_files import hash_lora, lora_file

if TYPE_CHECKING:
    from evaluation.benchmarks.tables.options import LoraOptions

PLAIN = "plain"
SCORES = ("style_accuracy", "caption_accuracy", "diversity")


class LoraScorer:
    """Scores image makers; loads the judges once.

    Args:
        protocol: prompts, noise, and the judges of captions and diversity.
        style: name of the style that is looked for.
        classifier: folder of the style classifier.
        batch_size: images at once.
        diversity_prompts: prompts of the diversity.
    """

    def __init__(
        self, protocol: Protocol, style: str, classifier: Path, batch_size: int, diversity_prompts: int
    ) -> None:
        self.protocol, self.batch_size, self.diversity_prompts = protocol, batch_size, diversity_prompts
        self.networks = ProtocolNetworks.load(protocol)
        self.classifier = StyleClassifier.from_pretrained(classifier)
        if style not in STYLES:
            raise ValueError(f"--style is '{style}', accepted are {', '.join(s for s in STYLES if s)}.")
        self.style = STYLES.index(style)

    def __call__(self, maker: ImageMaker) -> dict[str, Any]:
        """Share of images in the style, share with all stated attributes right (both with intervals), and diversity."""
        prompts = self.protocol.captions()
        captions, styled = CaptionAccuracy(self.networks.classifier), []
        for ids in torch.arange(len(prompts)).split(self.batch_size):
            texts = [prompts[number] for number in ids.tolist()]
            images = maker(texts, ids)
            captions.update(images, texts)
            styled.append(self.classifier.predict(images) == self.style)
        accuracy, style = captions.estimate()["caption_accuracy"], share_estimate(torch.cat(styled))
        return {
            "style_accuracy": style.value,
            "caption_accuracy": accuracy.value,
            "diversity": diversity(maker, prompts[: self.diversity_prompts], self.networks.clip),
            "intervals": {
                "style_accuracy": [style.low, style.high],
                "caption_accuracy": [accuracy.low, accuracy.high],
            },
        }


@as_user_errors()
def lora(options: LoraOptions) -> str:
    """Scores the plain student, and it with each LoRA at each scale; existing scores of the same files are kept."""
    protocol = get_protocol(options.protocol, samples=options.samples)
    judging = options.style, options.classifier, options.batch_size, options.diversity_prompts
    scorer = LoraScorer(protocol, *judging)
    settings = {
        "student_sha256": hash_model(options.student),
        "style": options.style,
        "classifier_sha256": hash_weights(options.classifier),
        "nfe": options.steps,
        "guidance_scale": options.guidance_scale,
        "diversity_prompts": options.diversity_prompts,
        "protocol": protocol.describe(),
    }
    machine = where(torch.device("cpu"))
    kept = KeptRows(
        options.out,
        settings,
        lambda runs: {**settings, "rows": _rows(runs), "runs": runs, **machine},
        key="runs",
    )
    for name, source, scale, seed in _runs(options):
        digest = None if source is None else hash_lora(source)
        key = f"{name}, seed {seed}" if source else name
        run = kept.known.get(key, {})
        if run.get("lora_sha256", "") != digest:
            maker = _real(options).get(name) or _pipeline(options, source, scale)
            run = {"row": name, "seed": seed, "lora_sha256": digest, **scorer(maker)}
            sys.stderr.write(f"{key}: {run}\n")
        kept.add(key, run)
    if options.sheet is not None:
        _sheet(options, protocol).save(options.sheet)
    return kept.finish()


def _runs(options: LoraOptions) -> list[tuple[str, str | None, float, int]]:
    """(row, LoRA, scale, seed); the first LoRA is measured at every scale, the others at 1. Real images come first."""
    found: list[tuple[str, str | None, float, int]] = [
        (name, None, 0.0, 0) for name in (*_real(options), PLAIN)
    ]
    example, taken = "score=outputs/lora/seed{seed}/lora", [name for name, *_ in found]
    for index, (name, folder) in enumerate(named_folders("--lora", example, options.lora, taken).items()):
        seeds = options.seeds if "{seed}" in folder else options.seeds[:1]
        for scale in options.scales if index == 0 else (1.0,):
            row = name if scale == 1.0 else f"{name}, scale {scale:g}"
            found += [(row, folder.replace("{seed}", str(seed)), scale, seed) for seed in seeds]
    return found


def _real(options: LoraOptions) -> dict[str, ImageMaker]:
    """By row, makers of the world's own images of the prompts: what a perfect model's diversity is."""
    styles: dict[str, Any] = {"real": None, f"real, {options.style}": options.style}
    return {name: partial(render_captions, style=style) for name, style in styles.items()}


def _pipeline(options: LoraOptions, source: str | None, scale: float) -> PipelineImages:
    pipeline = load_pipeline(options.student)
    move_pipeline(pipeline, "cpu", torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    if source is not None:
        pipeline.load_lora_weights(str(lora_file(source).parent), adapter_name="style")
        pipeline.set_adapters(["style"], [scale])
    return PipelineImages(pipeline, steps=options.steps, guidance_scale=options.guidance_scale, seed=0)


def _rows(runs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    rows: dict[str, list[dict[str, Any]]] = {}
    for run in runs.values():
        rows.setdefault(run["row"], []).append(run)
    return {
        name: {"seeds": [one["seed"] for one in found]}
        | {
            key: spread([one[key] for one in found]) | {"values": [one[key] for one in found]}
            for key in SCORES
        }
        for name, found in rows.items()
    }


def _sheet(options: LoraOptions, protocol: Protocol) -> Image.Image:
    """A row for each row of the table, first seed; the same prompts and noise."""
    prompts, ids = protocol.captions()[:SHEET_COLUMNS], torch.arange(SHEET_COLUMNS)
    images: dict[str, torch.Tensor] = {}
    for name, source, scale, seed in _runs(options):
        if seed in (0, options.seeds[0]):
            maker = _real(options).get(name) or _pipeline(options, source, scale)
            images.setdefault(name.replace(", ", "\n"), maker(prompts, ids))
    return sheet(images, prompts)
