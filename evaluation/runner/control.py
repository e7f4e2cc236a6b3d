"""`evaluation.evaluate --control`: does a ControlNet's output follow the condition, and what does that cost?

Each figure has two neighbours: *chance*, the same student without control, and *ceiling*, the autoencoder's reconstruction of
the image that the condition was made from, beyond which no output can go.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from data.prepare.common.machine import choose_device
from evaluation.images.control_sets import (
    ControlledPrompts,
    ControlSet,
    ShardControlSet,
    ToyControlSet,
    adherence_of,
    made_by,
    network_of,
)
from evaluation.images.controlled_pipeline import ControlledPipeline
from evaluation.images.prompt_list import captions_digest
from evaluation.images.samples import ModelSamples
from evaluation.metrics.control_adherence import ControlAdherence
from evaluation.protocols.image_protocol import metric_hash
from evaluation.protocols.protocols import Protocol, find_protocol, get_protocol
from evaluation.reports.grids import sheet
from evaluation.reports.result_file import write_result
from evaluation.runner.control_quality import Estimates, QualityMetrics
from evaluation.runner.machine import where
from sdxs_lightning.core.errors import UserError
from sdxs_lightning.core.image_condition import ImageCondition, description_of
from sdxs_lightning.core.model_hash import hash_model, hash_weights

if TYPE_CHECKING:
    from evaluation.evaluate import EvaluateOptions

ControlledMaker = Callable[[ControlledPrompts, Tensor], Tensor]
"""Maps prompts with conditions and their sample ids to images (B,3,H,W) uint8."""

GRID_COLUMNS = 8


class Board:
    """Adherence, and the protocol's metrics of image quality, over one set of images."""

    def __init__(self, adherence: ControlAdherence, quality: QualityMetrics) -> None:
        self.adherence, self.quality = adherence, quality.start()

    def update(self, images_uint8: Tensor, prompts: ControlledPrompts, sample_ids: Tensor) -> None:
        """Add images (B,3,H,W) with their prompts."""
        self.adherence.update_with(images_uint8, prompts.controls_uint8.to(images_uint8.device), sample_ids)
        self.quality.update(images_uint8, prompts.captions, sample_ids)

    def compute(self) -> dict[str, float]:
        """All figures by name."""
        found = self.adherence.estimates()
        return {name: one.value for name, one in found.items()} | self.quality.compute()

    def estimates(self) -> Estimates:
        """All figures by name, with their intervals."""
        return self.adherence.estimates() | self.quality.estimates()


@dataclass(frozen=True)
class ControlFigures:
    """What was measured over a control set."""

    estimates: dict[str, Estimates]
    """By maker and metric."""
    captions: str
    """Digest of the captions."""
    targets: str
    """Digest of captions, condition images, and images that these belong to."""

    def values(self, maker: str) -> dict[str, float]:
        """The figures of a maker without their intervals."""
        return {name: one.value for name, one in self.estimates[maker].items()}


def measure_control(
    makers: dict[str, ControlledMaker],
    control_set: ControlSet,
    adherence: Callable[[], ControlAdherence],
    quality: QualityMetrics,
    batch_size: int,
) -> ControlFigures:
    """Figures of each maker over the set.

    Args:
        makers: by name.
        control_set: prompts with conditions.
        adherence: makes an empty adherence metric.
        quality: the other metrics.
        batch_size: images at once.
    """
    boards = {name: Board(adherence(), quality) for name in makers}
    captions: list[str] = []
    digest = hashlib.sha256()
    for sample_ids in torch.arange(control_set.count).split(batch_size):
        prompts = control_set.batch(sample_ids.tolist())
        captions += prompts.captions
        for caption, *images in zip(*prompts, strict=True):
            digest.update(f"{caption}\0".encode())
            for image in images:
                digest.update(image.contiguous().numpy().tobytes())
        for name, maker in makers.items():
            boards[name].update(maker(prompts, sample_ids), prompts, sample_ids)
    found = {name: board.estimates() for name, board in boards.items()}
    return ControlFigures(found, captions_digest(captions), digest.hexdigest()[:12])


def control_sheet(prompts: ControlledPrompts, output: Tensor, without: Tensor) -> Any:
    """The grid condition | output | target | without control, one column per prompt."""
    rows = {
        "condition": prompts.controls_uint8,
        "output": output,
        "target": prompts.targets_uint8,
        "without\ncontrol": without,
    }
    return sheet(rows, prompts.captions)


def open_control_set(options: EvaluateOptions, condition: ImageCondition) -> tuple[ControlSet, int]:
    """The set of `--control`, and the seed of its protocol.

    Raises:
        UserError: for options that contradict each other.
    """
    assert options.control is not None
    protocol = find_protocol(options.protocol)
    if options.control == "toy":
        if not isinstance(protocol, Protocol):
            raise UserError(f"--control toy goes with --protocol toy or toy-val, got {options.protocol}.")
        toy = get_protocol(options.protocol, samples=options.samples)
        return ToyControlSet(toy.split, toy.samples, condition), toy.seed
    made = condition if options.make_conditions else None
    found = ShardControlSet(options.control, options.image_px, options.samples, made)
    return found, protocol.seed


def evaluate_control(options: EvaluateOptions) -> str:
    """Measures, writes FILE.json, FILE.md and FILE.png, and returns the table."""
    started = time.perf_counter()
    device = torch.device(choose_device(options.device))
    assert options.condition is not None and options.controlnet is not None and options.model is not None
    condition = made_by(options.condition)
    control_set, seed = open_control_set(options, condition)
    samples = ModelSamples(
        options.model,
        (),
        len(options.timesteps) or options.steps,
        options.guidance_scale,
        seed if options.seed is None else options.seed,
        options.image_px,
        options.precision,
        options.scheduler,
        options.timesteps,
        options.lora,
        options.lora_scale,
    )
    quality = QualityMetrics(options.protocol, device, options.metrics, options.reference, options.weights)
    classifier: Any = None if quality.toy is None else quality.toy.classifier
    metric = adherence_of(condition, classifier)  # raises before any image is made
    pipeline = ControlledPipeline.load(samples, options.controlnet, device)
    makers: dict[str, ControlledMaker] = {"chance": pipeline.at(0.0), "ceiling": pipeline.reconstructed}
    makers |= {f"{scale:g}": pipeline.at(scale) for scale in options.conditioning_scales}
    figures = measure_control(
        makers, control_set, lambda: adherence_of(condition, classifier), quality, options.batch_size
    )
    full = 1.0 if 1.0 in options.conditioning_scales else options.conditioning_scales[-1]
    asked = {"condition": _identity(condition), "set_sha256": figures.targets, "conditioning_scale": full}
    of_quality = quality.settings(control_set.count, figures.captions)
    of_adherence = {"tolerance_px": getattr(metric, "tolerance_px", None), "samples": control_set.count}
    entries = {}
    for name, estimate in figures.estimates[f"{full:g}"].items():
        whole = {"metric": name, **of_quality.get(name, of_adherence), **asked}
        entries[name] = {**estimate.as_dict(), "hash": metric_hash(whole), "settings": whole}
    origin = samples.origin()
    del origin["prompts_sha256"]  # of no prompts; `captions_sha256` has them
    result = {
        "model": options.model,
        "controlnet": options.controlnet,
        **origin,
        "controlnet_sha256": hash_weights(options.controlnet),
        "captions_sha256": figures.captions,
        "condition": options.condition,
        "control": options.control,
        "samples": control_set.count,
        "chance": figures.values("chance"),
        "ceiling": figures.values("ceiling"),
        "conditioning_scale": {f"{one:g}": figures.values(f"{one:g}") for one in options.conditioning_scales},
        "protocol": {"name": options.protocol},
        "metrics": entries,
        **where(device),
        "seconds": round(time.perf_counter() - started, 1),
    }
    page = control_markdown(result)
    if options.out is not None:
        write_result(options.out, result)
        options.out.with_suffix(".md").write_text(page + "\n")
        ids = torch.arange(min(GRID_COLUMNS, control_set.count))
        prompts = control_set.batch(ids.tolist())
        pictures = [pipeline.at(scale)(prompts, ids) for scale in (full, 0.0)]
        control_sheet(prompts, *pictures).save(options.out.with_suffix(".png"))
    return page


def _identity(condition: ImageCondition) -> dict[str, str]:
    """How a condition is read: class and settings, with the weights of a network in place of its folder."""
    network = network_of(condition)
    if network is None:
        return {"read_by": description_of(condition)}
    named = str(getattr(condition, "folder", None) or getattr(condition, "model", None))
    weights = hash_model(named) if Path(named).is_dir() else named  # else a hub id
    return {"read_by": type(condition).__name__, "weights_sha256": weights}


def control_markdown(result: dict[str, Any]) -> str:
    """The figures as a table, one row per conditioning scale, chance first and ceiling last."""
    names = list(result["chance"])
    rows = {"without control (chance)": result["chance"]}
    rows |= {f"conditioning scale {scale}": found for scale, found in result["conditioning_scale"].items()}
    rows["autoencoder (ceiling)"] = result["ceiling"]
    lines = [f"| {result['condition']} | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for label, found in rows.items():
        lines.append(f"| {label} | " + " | ".join(f"{found[name]:.4g}" for name in names) + " |")
    return "\n".join(lines)
