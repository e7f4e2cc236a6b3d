"""`evaluation.evaluate --control`: does a ControlNet's output follow the condition, and what does that cost?

Each figure has two neighbours: *chance*, the same student without control, and *ceiling*, the autoencoder's reconstruction of
the image that the condition was made from, beyond which no output can go.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
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
)
from evaluation.images.samples import load_pipeline, with_controlnet
from evaluation.metrics.control_adherence import ControlAdherence
from evaluation.metrics.sampled import SampledMetric
from evaluation.protocols.image_protocol import Measurement
from evaluation.protocols.metric_table import NetworkCache
from evaluation.protocols.names import REFERENCE_METRICS, parse_weights
from evaluation.protocols.protocols import Protocol, find_protocol, get_protocol
from evaluation.protocols.references import Reference, read_reference
from evaluation.reports.grids import sheet
from evaluation.runner.machine import where
from evaluation.runner.scores import ProtocolNetworks, ToyMetrics
from sdxs_lightning.core.errors import UserError
from sdxs_lightning.core.latents import from_uint8, to_uint8
from sdxs_lightning.core.model_hash import hash_model
from sdxs_lightning.core.seeding import Stream, normal
from sdxs_lightning.inference.inputs import torch_dtype

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


class QualityMetrics:
    """The metrics of a protocol, started anew for each set of images.

    Args:
        protocol: a toy protocol measures its own metrics, an image protocol those of `metrics`.
        device: of the networks.
        metrics: names of an image protocol's metrics.
        reference: npz of the real images, for metrics that need one.
        weights: `KIND=PATH` of metric networks.

    Raises:
        UserError: for a metric without its reference.
    """

    def __init__(
        self,
        protocol: str,
        device: torch.device,
        metrics: Sequence[str] = (),
        reference: str | None = None,
        weights: Sequence[str] = (),
    ) -> None:
        self.device = device
        found = find_protocol(protocol)
        self.toy = ProtocolNetworks.load(found) if isinstance(found, Protocol) else None
        self._measurements: list[Measurement] = []
        self._references: dict[str, Reference] = {}
        self._networks = NetworkCache(dict(parse_weights(text) for text in weights))
        if not isinstance(found, Protocol):
            self._measurements = [found.measurement(name) for name in metrics]
        for one in self._measurements:
            if one.metric not in REFERENCE_METRICS:
                continue
            if reference is None or not reference.endswith(".npz"):
                raise UserError(f"{one.metric} with --control needs --reference FILE.npz, got {reference}.")
            identity = self._networks.identity(one)
            self._references[one.metric] = read_reference(Path(reference), one, identity)

    def start(self) -> ToyQuality | ImageQuality:
        """Empty metrics."""
        if self.toy is not None:
            return ToyQuality(ToyMetrics(self.toy, self.device))
        metrics = [
            self._networks.metric(one, self._references.get(one.metric)).to(self.device)
            for one in self._measurements
        ]
        return ImageQuality(self._measurements, metrics)


@dataclass(frozen=True)
class ToyQuality:
    """FID, CLIP score and caption accuracy of the toy world."""

    metrics: ToyMetrics

    def update(self, images_uint8: Tensor, captions: Sequence[str], sample_ids: Tensor) -> None:
        self.metrics.update(images_uint8, captions)

    def compute(self) -> dict[str, float]:
        return self.metrics.compute().as_dict()


@dataclass(frozen=True)
class ImageQuality:
    """Metrics of an image protocol; none are measured unless `--metrics` names some."""

    measurements: Sequence[Measurement]
    metrics: Sequence[SampledMetric]

    def update(self, images_uint8: Tensor, captions: Sequence[str], sample_ids: Tensor) -> None:
        from evaluation.callbacks.image_metrics import add_images

        add_images(self.measurements, self.metrics, images_uint8, captions, sample_ids)

    def compute(self) -> dict[str, float]:
        return {name: one.value for metric in self.metrics for name, one in metric.estimates().items()}


@dataclass(frozen=True)
class ControlledPipeline:
    """Images of a student's pipeline with a ControlNet, by diffusers' own pipelines."""

    pipeline: Any
    """Of class StableDiffusionControlNetPipeline or StableDiffusionXLControlNetPipeline."""
    steps: int
    guidance_scale: float
    seed: int
    """Seed of the noise, which is that of `evaluation.evaluate` without `--control`."""
    conditioning_scale: float
    """Factor of the residuals; 0 is the student without control."""

    @classmethod
    def load(cls, options: EvaluateOptions, seed: int, device: torch.device) -> ControlledPipeline:
        """Loads the student's folder and the ControlNet's.

        Raises:
            UserError: if one of them is missing.
        """
        from sdxs_lightning.networks.controlnet import check_fits, load_controlnet

        assert options.model is not None and options.controlnet is not None
        try:
            controlnet = load_controlnet(options.controlnet)
            plain = load_pipeline(options.model)
            check_fits(controlnet, plain.unet, f"--controlnet '{options.controlnet}'")
        except (OSError, ValueError) as error:
            raise UserError(str(error)) from error
        pipeline = with_controlnet(plain, controlnet)
        pipeline.to(device, torch_dtype(options.precision))
        pipeline.set_progress_bar_config(disable=True)
        return cls(pipeline, options.steps, options.guidance_scale, seed, 1.0)

    def at(self, conditioning_scale: float) -> ControlledPipeline:
        """The same with another conditioning scale."""
        return ControlledPipeline(
            self.pipeline, self.steps, self.guidance_scale, self.seed, conditioning_scale
        )

    @torch.no_grad()
    def __call__(self, prompts: ControlledPrompts, sample_ids: Tensor) -> Tensor:
        pipeline = self.pipeline
        controls = prompts.controls_uint8.to(pipeline.device).float() / 255
        side = controls.shape[-1] // pipeline.vae_scale_factor
        shape = pipeline.unet.config.in_channels, controls.shape[-2] // pipeline.vae_scale_factor, side
        noise = normal(self.seed, Stream.EVALUATION, sample_ids.to(pipeline.device), shape)
        images: Tensor = pipeline(
            prompt=list(prompts.captions),
            image=controls.to(pipeline.unet.dtype),
            latents=noise.to(pipeline.unet.dtype),
            num_inference_steps=self.steps,
            guidance_scale=self.guidance_scale,
            controlnet_conditioning_scale=self.conditioning_scale,
            generator=[torch.Generator().manual_seed(number) for number in sample_ids.tolist()],
            output_type="pt",
        ).images
        return to_uint8(images.float().nan_to_num(0.0) * 2 - 1)

    @torch.no_grad()
    def reconstructed(self, prompts: ControlledPrompts, sample_ids: Tensor) -> Tensor:
        """The targets through the pipeline's autoencoder: the ceiling."""
        vae = self.pipeline.vae
        images = from_uint8(prompts.targets_uint8.to(vae.device)).to(vae.dtype)
        encoded = vae.encode(images)
        latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
        return to_uint8(vae.decode(latents).sample.float())


def measure_control(
    makers: dict[str, ControlledMaker],
    control_set: ControlSet,
    adherence: Callable[[], ControlAdherence],
    quality: QualityMetrics,
    batch_size: int,
) -> dict[str, dict[str, float]]:
    """Figures of each maker over the set.

    Args:
        makers: by name.
        control_set: prompts with conditions.
        adherence: makes an empty adherence metric.
        quality: the other metrics.
        batch_size: images at once.
    """
    boards = {name: Board(adherence(), quality) for name in makers}
    for sample_ids in torch.arange(control_set.count).split(batch_size):
        prompts = control_set.batch(sample_ids.tolist())
        for name, maker in makers.items():
            boards[name].update(maker(prompts, sample_ids), prompts, sample_ids)
    return {name: board.compute() for name, board in boards.items()}


def control_sheet(prompts: ControlledPrompts, rows: dict[str, Tensor]) -> Any:
    """The grid condition | output | target | without control, one column per prompt."""
    pages = {"condition": prompts.controls_uint8, "target": prompts.targets_uint8}
    order = {"condition": pages["condition"], **rows, "target": pages["target"]}
    return sheet(order, prompts.captions)


def open_control_set(options: EvaluateOptions) -> tuple[ControlSet, int]:
    """The set of `--control`, and the seed of its protocol.

    Raises:
        UserError: for options that contradict each other.
    """
    assert options.control is not None and options.condition is not None
    protocol = find_protocol(options.protocol)
    if options.control == "toy":
        if not isinstance(protocol, Protocol):
            raise UserError(f"--control toy goes with --protocol toy or toy-val, got {options.protocol}.")
        toy = get_protocol(options.protocol, samples=options.samples)
        return ToyControlSet(toy.split, toy.samples, options.condition), toy.seed
    made = options.condition != "background_bar" and options.condition.partition(":")[0] != "reader"
    condition = made_by(options.condition) if options.make_conditions and made else None
    found = ShardControlSet(options.control, options.image_px, options.samples, condition)
    return found, protocol.seed


def evaluate_control(options: EvaluateOptions) -> str:
    """Measures, writes FILE.json, FILE.md and FILE.png, and returns the table."""
    started = time.perf_counter()
    device = torch.device(choose_device(options.device))
    control_set, seed = open_control_set(options)
    seed = seed if options.seed is None else options.seed
    quality = QualityMetrics(options.protocol, device, options.metrics, options.reference, options.weights)
    classifier: Any = None if quality.toy is None else quality.toy.classifier
    assert options.condition is not None and options.controlnet is not None and options.model is not None
    condition = options.condition
    adherence_of(condition, classifier)  # raises before any image is made
    pipeline = ControlledPipeline.load(options, seed, device)
    makers: dict[str, ControlledMaker] = {"chance": pipeline.at(0.0), "ceiling": pipeline.reconstructed}
    makers |= {f"{scale:g}": pipeline.at(scale) for scale in options.conditioning_scales}
    figures = measure_control(
        makers, control_set, lambda: adherence_of(condition, classifier), quality, options.batch_size
    )
    chance, ceiling = figures.pop("chance"), figures.pop("ceiling")
    result = {
        "model": options.model,
        "controlnet": options.controlnet,
        "model_sha256": hash_model(options.model),
        "condition": condition,
        "control": options.control,
        "samples": control_set.count,
        "nfe": options.steps,
        "seed": seed,
        "chance": chance,
        "ceiling": ceiling,
        "conditioning_scale": figures,
        "protocol": {"name": options.protocol},
        **where(device),
        "seconds": round(time.perf_counter() - started, 1),
    }
    page = control_markdown(result)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=2) + "\n")
        options.out.with_suffix(".md").write_text(page + "\n")
        ids = torch.arange(min(GRID_COLUMNS, control_set.count))
        prompts = control_set.batch(ids.tolist())
        full = options.conditioning_scales[-1] if 1.0 not in options.conditioning_scales else 1.0
        rows = {"output": pipeline.at(full)(prompts, ids), "without\ncontrol": pipeline.at(0.0)(prompts, ids)}
        control_sheet(prompts, rows).save(options.out.with_suffix(".png"))
    return page


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
