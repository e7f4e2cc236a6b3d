"""Scores image to image on the toy world: what a student keeps of an image, and what it takes from the prompt, by strength."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from evaluation.benchmarks.tables.score_files import KeptRows
from evaluation.benchmarks.tables.scores import SHEET_COLUMNS
from evaluation.images.generate import RealImages
from evaluation.metrics.caption_accuracy import CaptionAccuracy, Classifier
from evaluation.protocols.protocols import Protocol, get_protocol
from evaluation.reports.grids import sheet
from evaluation.runner.machine import where
from evaluation.runner.scores import ProtocolNetworks
from evaluation.user_errors import as_user_errors
from sdxs_lightning.core.model_hash import hash_model
from sdxs_lightning.inference.generator import OneStepGenerator

if TYPE_CHECKING:
    from evaluation.benchmarks.tables.options import ImageToImageOptions

ORDERED_BY = "input_agreement"
ONE_STEP = "one-step student"
Maker = Callable[[Sequence[str], list[int], Tensor], Tensor]
"""Maps prompts, seeds and uint8 input images (B, 3, H, W) to uint8 images (B, 3, H, W)."""


def other_prompts(captions: Sequence[str]) -> list[str]:
    """For each image the caption of another one: that half the list further."""
    half = len(captions) // 2
    return [*captions[half:], *captions[:half]]


def image_scores(
    maker: Maker, protocol: Protocol, classifier: Classifier, batch_size: int
) -> dict[str, dict[str, float | None]]:
    """Agreement of the images with the input and with the prompt, each with its 95 % interval.

    Args:
        maker: makes the images from rendered test images and the captions of others.
        protocol: captions and seed.
        classifier: finds the attributes in the images.
        batch_size: images at once.

    Returns:
        `input_agreement`: share of the attributes that the input's caption states and the image has; `prompt_agreement`
        likewise of the prompt; `caption_accuracy`: share of images with all attributes of the prompt.
    """
    captions = protocol.captions()
    prompts, reader = other_prompts(captions), RealImages(protocol.split)
    of_input, of_prompt = CaptionAccuracy(classifier), CaptionAccuracy(classifier)
    for ids in torch.arange(len(captions)).split(batch_size):
        numbers = ids.tolist()
        texts, wanted = [captions[i] for i in numbers], [prompts[i] for i in numbers]
        images = maker(wanted, [protocol.seed + i for i in numbers], reader(texts, ids))
        of_input.update(images, texts)
        of_prompt.update(images, wanted)
    found = {
        "input_agreement": of_input.estimate()["attribute_accuracy"],
        "prompt_agreement": of_prompt.estimate()["attribute_accuracy"],
        "caption_accuracy": of_prompt.estimate()["caption_accuracy"],
    }
    return {name: {"value": one.value, "low": one.low, "high": one.high} for name, one in found.items()}


@as_user_errors()
def image_to_image(options: ImageToImageOptions) -> str:
    """Scores the inputs themselves, each strength, and text to image; existing scores of the same files are kept."""
    protocol = get_protocol(options.protocol, samples=options.samples)
    makers = list(_makers(options))  # refuses a model before anything is measured
    classifier = ProtocolNetworks.load(protocol).classifier
    settings: dict[str, Any] = {
        "student_sha256": hash_model(options.student),
        "ordered_by": ORDERED_BY,
        "protocol": protocol.describe(),
    }
    machine = where(torch.device("cpu"))
    kept = KeptRows(options.out, settings, lambda rows: {**settings, "rows": rows, **machine})
    examples: dict[str, Tensor] = {}
    captions = protocol.captions()
    ids = torch.arange(min(SHEET_COLUMNS, len(captions)))
    shown = other_prompts(captions)[: len(ids)]
    real = RealImages(protocol.split)(captions[: len(ids)], ids)
    for name, maker in makers:
        single = hash_model(options.single) if name == ONE_STEP and options.single is not None else None
        row = kept.known.get(name, {})
        if row.get("single_sha256", "") != single:
            row = {
                "single_sha256": single,
                "estimates": image_scores(maker, protocol, classifier, options.batch_size),
            }
            sys.stderr.write(f"{name}: {row}\n")
        kept.add(name, row)
        if options.sheet is not None:
            seeds = [protocol.seed + i for i in ids.tolist()]
            examples[name.replace(", ", "\n")] = maker(shown, seeds, real)
    if options.sheet is not None:
        sheet(examples, shown).save(options.sheet)
    return kept.finish()


def _makers(options: ImageToImageOptions) -> Iterator[tuple[str, Maker]]:
    """(row, maker); a student of one step stands beside the student's own first step."""
    student = OneStepGenerator.load(options.student, device="cpu")
    for strength in options.strengths:
        student.plan.from_strength(strength)  # refuses one that leaves no step
    yield "input", lambda prompts, seeds, images: images
    for strength in options.strengths:
        yield f"strength {strength:g}", _with_strength(student, strength)
    steps = len(student.plan.steps)
    for count in dict.fromkeys((steps, 1)):
        generator = OneStepGenerator.load(options.student, device="cpu", steps=count)
        yield f"no input, {count} step{'s' * (count > 1)}", _from_text(generator)
    if options.single is not None:
        yield ONE_STEP, _from_text(OneStepGenerator.load(options.single, device="cpu"))


def _with_strength(generator: OneStepGenerator, strength: float) -> Maker:
    return lambda prompts, seeds, images: generator.generate(prompts, seeds, image=images, strength=strength)


def _from_text(generator: OneStepGenerator) -> Maker:
    return lambda prompts, seeds, images: generator.generate(prompts, seeds)
