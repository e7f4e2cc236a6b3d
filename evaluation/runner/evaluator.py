"""A set of images under a protocol: every metric in one pass, each number with what is needed to quote it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from evaluation.images.image_sets import open_images
from evaluation.images.prompt_files import captions_digest
from evaluation.images.samples import ModelSamples, Samples, StoredSamples
from evaluation.protocols.image_protocol import ImageProtocol, Measurement, hashed_settings, metric_hash
from evaluation.protocols.metric_table import IMAGES_PER_PROMPT, NetworkCache, shared_networks
from evaluation.protocols.names import CAPTION_METRICS, REFERENCE_METRICS
from evaluation.protocols.references import Reference, read_reference
from evaluation.runner.passes import MetricPass, PassJob, load_kept_images, processes_for, run_pass
from evaluation.runner.row_store import MeasuredBatch, RowStore
from sdxs_lightning.core.errors import UserError

DIVERSITY_PROMPTS = 50
"""The first ones of a protocol."""


@dataclass(frozen=True)
class Resources:
    """Where and how the work is done; no number depends on it beyond rounding."""

    device: str = "cpu"
    """ "cpu" or "cuda"."""
    processes: int | None = None
    """None is one a GPU or core, where there is enough to do."""
    batch_size: int = 100
    """Images at once."""


@dataclass(frozen=True)
class EvaluationRequest:
    """What is to be measured."""

    protocol: ImageProtocol
    """How."""
    samples: Samples
    """Of what."""
    metrics: tuple[str, ...]
    """Which numbers."""
    captions: tuple[str, ...] | None = None
    """One an image, where they are known."""
    reference: str | None = None
    """Images, or an npz."""
    known: Mapping[str, Reference] = field(default_factory=dict)
    """References at hand, by metric; the toy world's."""
    weights: tuple[tuple[str, str], ...] = ()
    """Where networks are, by kind, instead of the usual place."""
    fingerprint: tuple[str, Mapping[str, Any]] | None = None
    """Hash and settings of all metrics; the toy world's protocols have one for all."""


@dataclass(frozen=True)
class EvaluationResult:
    """What came out."""

    metrics: dict[str, dict[str, Any]]
    """By name: `value`, `samples`, `low`, `high`, `infinity`, `hash`, `settings`; what is not known is left out."""
    images: Mapping[int, Image.Image]
    """The first images, by number."""
    reference_images: Mapping[int, Image.Image]
    """Of the reference, where it was given as images."""


def run_evaluation(
    request: EvaluationRequest, resources: Resources, work: Path, keep_images: int = 0
) -> EvaluationResult:
    """Measures; what an earlier call left in the same folder is not measured again.

    Args:
        request: what.
        resources: device, processes and batch size.
        work: folder for the rows of every network, batch by batch.
        keep_images: how many of the first images to keep for a report.

    Raises:
        UserError: for whatever the user can mend.
    """
    measurements = [request.protocol.measurement(name) for name in request.metrics if name != "diversity"]
    _refuse_what_is_missing(request)
    networks = shared_networks(request.weights)  # before anything long: missing weights are told now
    identities = {one: networks.identity(one) for one in measurements}
    comparing = [one for one in measurements if one.metric in REFERENCE_METRICS]
    extra = measure_diversity(request, networks, resources, work) if "diversity" in request.metrics else {}
    if not measurements:
        return EvaluationResult(extra, {}, {})
    references, reference_images = _references(request, comparing, identities, resources, work, keep_images)
    origin = request.samples.origin()
    if request.captions is not None:
        origin["captions"] = captions_digest(request.captions)
    job = build_pass(request.samples, measurements, identities, origin, request, resources, work, keep_images)
    parts = run_pass(job, request.protocol.name)
    found: dict[str, dict[str, Any]] = {}
    for metric_pass, part in parts.items():
        one = metric_pass.measurement
        settings, digest = _settings(request, one, identities[one], references.get(one.metric))
        for name, estimate in _estimates(networks, one, part, references.get(one.metric)).items():
            found[name] = {**estimate, "hash": digest, "settings": settings}
    return EvaluationResult(found | extra, load_kept_images(job) if keep_images else {}, reference_images)


def measure_diversity(
    request: EvaluationRequest, networks: NetworkCache, resources: Resources, work: Path
) -> dict[str, dict[str, Any]]:
    """Diversity per prompt: of the first prompts the model makes several images each, beside those of the protocol.

    Raises:
        UserError: for images that are not made by a model: one of each prompt cannot say it.
    """
    if not isinstance(request.samples, ModelSamples):
        raise UserError(
            "diversity needs several images of one prompt, which only a --model makes; leave it out of --metrics."
        )
    one = request.protocol.measurement("diversity")
    first = request.samples.prompts[:DIVERSITY_PROMPTS]
    repeated = tuple(prompt for prompt in first for _ in range(IMAGES_PER_PROMPT))
    samples = replace(request.samples, prompts=repeated)
    inner = replace(request, samples=samples, captions=None)
    identities = {one: networks.identity(one)}
    origin = {**samples.origin(), "captions": captions_digest(repeated), "each": IMAGES_PER_PROMPT}
    job = build_pass(samples, [one], identities, origin, inner, resources, work)
    (part,) = run_pass(job, "diversity").values()
    settings, digest = _settings(replace(inner, captions=repeated), one, identities[one], None)
    return {
        name: {**estimate, "hash": digest, "settings": settings}
        for name, estimate in _estimates(networks, one, part, None).items()
    }


def build_pass(
    samples: Samples,
    measurements: list[Measurement],
    identities: Mapping[Measurement, Mapping[str, str]],
    origin: Mapping[str, Any],
    request: EvaluationRequest,
    resources: Resources,
    work: Path,
    keep_images: int = 0,
    real: bool = False,
) -> PassJob:
    """The job that measures all networks over a set; networks that several metrics share metric_pass once."""
    metric_passes: dict[tuple[str, ...], MetricPass] = {}
    for one in measurements:
        steps = one.reference_steps if real else one.steps
        settings = {**origin, "judge": dict(identities[one]), "words": one.network, "steps": list(steps)}
        what = one.network.partition(":")[0]
        store = RowStore.at(work, what, settings, samples.count, resources.batch_size)
        metric_passes[one.metric, *steps] = MetricPass(one, steps, store)
    stores = [metric_pass.store for metric_pass in metric_passes.values()]
    processes = processes_for(resources.processes, resources.device, stores[0].batches)
    kept_images = work / f"{'real' if real else 'images'}-{stores[0].folder.name.rpartition('-')[2]}"
    return PassJob(
        samples,
        tuple(metric_passes.values()),
        request.captions if not real else None,
        request.weights,
        resources.device,
        processes,
        one_size=not real,
        kept_images=kept_images,
        keep_images=keep_images,
    )


def _references(
    request: EvaluationRequest,
    comparing: list[Measurement],
    identities: Mapping[Measurement, Mapping[str, str]],
    resources: Resources,
    work: Path,
    keep_images: int,
) -> tuple[dict[str, Reference], Mapping[int, Image.Image]]:
    """The real side of each metric that has one, and pictures of it."""
    if request.known or not comparing:
        return dict(request.known), {}
    assert request.reference is not None
    if request.reference.endswith(".npz"):
        path = Path(request.reference)
        return {one.metric: read_reference(path, one, identities[one]) for one in comparing}, {}
    samples = StoredSamples(open_images(request.reference))
    origin = samples.origin()
    job = build_pass(samples, comparing, identities, origin, request, resources, work, keep_images, real=True)
    parts = run_pass(job, "reference")
    digest = samples.source.digest()
    found = {
        metric_pass.measurement.metric: Reference(digest, rows=part.rows)
        for metric_pass, part in parts.items()
    }
    return found, load_kept_images(job) if keep_images else {}


def _estimates(
    networks: NetworkCache, one: Measurement, part: MeasuredBatch, reference: Reference | None
) -> dict[str, dict[str, Any]]:
    """The numbers of one metric."""
    try:
        metric = networks.metric(one, reference)
        metric.add(part.rows, torch.arange(len(part.rows)))
        return {name: estimate.as_dict() for name, estimate in metric.estimates().items()}
    except ValueError as error:
        raise UserError(str(error)) from error


def _settings(
    request: EvaluationRequest, one: Measurement, identity: Mapping[str, str], reference: Reference | None
) -> tuple[Mapping[str, Any], str]:
    if request.fingerprint is not None:
        return request.fingerprint[1], request.fingerprint[0]
    settings = hashed_settings(
        request.protocol,
        one,
        identity,
        request.samples.count,
        request.samples.formats,
        None if request.captions is None else captions_digest(request.captions),
        None if reference is None else reference.digest,
    )
    return settings, metric_hash(settings)


def _refuse_what_is_missing(request: EvaluationRequest) -> None:
    readers = [name for name in request.metrics if name in CAPTION_METRICS]
    if readers and request.captions is None:
        others = [name for name in request.metrics if name not in CAPTION_METRICS]
        raise UserError(
            f"{', '.join(readers)} reads captions; give --captions FILE, .txt files beside the images, or shards with "
            f"captions{f', or leave it out with --metrics {chr(32).join(others)}' if others else ''}."
        )
    comparing = [name for name in request.metrics if name in REFERENCE_METRICS]
    if comparing and request.reference is None and not request.known:
        raise UserError(
            f"{', '.join(comparing)} compares with real images; give --reference a folder, a .zip file, shards, or an .npz "
            "of `python -m evaluation.reference`."
        )
    if request.protocol.lossless and request.samples.formats != "lossless":
        raise UserError(
            f"the images are {request.samples.formats} files, but protocol {request.protocol.name} takes lossless ones: JPEG "
            "moves FID by a tenth and more. Give PNG files, or a protocol such as `clean`, whose hash says so."
        )
    if request.captions is not None and len(request.captions) != request.samples.count:
        raise UserError(
            f"{request.samples.count} images and {len(request.captions)} captions; one each is needed."
        )
