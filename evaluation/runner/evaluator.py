"""Evaluates a set of images under a protocol: all metrics in one pass, with intervals and hashes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from data.prepare.common.shared_work import Workforce
from evaluation.images.image_sets import NumberedImages, open_images
from evaluation.images.prompt_list import captions_digest
from evaluation.images.samples import ModelSamples, Samples, StoredSamples
from evaluation.images.saved_images import SavedImages
from evaluation.metrics.sampled import PerImageMetric, SampledMetric
from evaluation.protocols.image_protocol import ImageProtocol, Measurement, hashed_settings, metric_hash
from evaluation.protocols.metric_table import IMAGES_PER_PROMPT, NetworkCache, shared_networks
from evaluation.protocols.names import CAPTION_METRICS, REFERENCE_METRICS
from evaluation.protocols.references import Reference, read_reference
from evaluation.runner.machine import versions
from evaluation.runner.passes import MetricPass, PassJob, load_kept_images, processes_for, run_pass
from evaluation.runner.row_store import MeasuredBatch, RowStore
from sdxs_lightning.core.errors import UserError

DIVERSITY_PROMPTS = 50
"""Number of prompts for diversity, the first ones of the protocol."""

ROWS_VERSION = 2
"""Version of the rows on disk; incremented by every change of decoding, image steps or networks that affects them."""


@dataclass(frozen=True)
class Resources:
    """Hardware and batch size; results do not depend on them beyond rounding."""

    device: str = "cpu"
    """"cpu" or "cuda"."""
    processes: int | None = None
    """Number of processes; None is one per GPU or core, limited by the number of batches."""
    batch_size: int = 100
    """Images per batch."""
    workers: Workforce | None = None
    """Who makes images; None are processes of this machine. Files are read by this machine."""


@dataclass(frozen=True)
class EvaluationRequest:
    """Images, protocol and metrics of an evaluation."""

    protocol: ImageProtocol
    samples: Samples
    metrics: tuple[str, ...]
    captions: tuple[str, ...] | None = None
    """One caption per image, if known."""
    reference: str | None = None
    """Reference images, or an npz file."""
    known: Mapping[str, Reference] = field(default_factory=dict)
    """Loaded references by metric, for toy protocols."""
    weights: tuple[tuple[str, str], ...] = ()
    """Files or folders of network weights by kind, in place of the default location."""
    fingerprint: tuple[str, Mapping[str, Any]] | None = None
    """Common hash and settings of all metrics, for toy protocols."""
    categories: tuple[str, ...] | None = None
    """Category of each image, if the prompt set has categories."""
    saved: SavedImages | None = None
    """Folder for the generated images."""


@dataclass(frozen=True)
class EvaluationResult:
    """Metrics, sample images and notes of an evaluation."""

    metrics: dict[str, dict[str, Any]]
    """By name: `value`, `samples`, `low`, `high`, `infinity`, `left_out`, `categories`, `hash`, `settings`, without unknown
    fields."""
    images: Mapping[int, Image.Image]
    """The first images by number."""
    reference_images: Mapping[int, Image.Image]
    """The first reference images by number, if the reference was given as images."""
    failed: Mapping[str, str] = field(default_factory=dict)
    """Failed metrics with the reason."""
    image_statistics: Mapping[str, Any] = field(default_factory=dict)
    """`sizes`: number of images per size; `constant_images`: number of single-colour images."""
    notes: tuple[str, ...] = ()
    """Remarks to show beside the metrics."""


def run_evaluation(
    request: EvaluationRequest, resources: Resources, work: Path, keep_images: int = 0
) -> EvaluationResult:
    """Run an evaluation, resuming from the results of an earlier call in the same folder.

    The request is validated before the first image. A metric that fails later does not affect the others.

    Args:
        request: images, protocol and metrics.
        resources: device, processes and batch size.
        work: folder for intermediate results.
        keep_images: number of images to return for a report.

    Raises:
        UserError: for invalid requests and missing files.
    """
    measurements = [request.protocol.measurement(name) for name in request.metrics if name != "diversity"]
    _refuse_what_is_missing(request)
    networks = shared_networks(request.weights)  # raises for missing weights before measuring
    identities = {one: networks.identity(one) for one in measurements}
    comparing = [one for one in measurements if one.metric in REFERENCE_METRICS]
    reference = _open_reference(request, comparing, identities)
    _refuse_what_does_not_fit(request, networks, comparing, reference)
    if request.saved is not None:
        request.saved.begin(request.samples.origin())
    evaluated: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    if "diversity" in request.metrics:
        evaluated |= evaluate_diversity(request, networks, resources, work, failed)
    if not measurements:
        return EvaluationResult(evaluated, {}, {}, failed)
    origin = request.samples.origin()
    references: dict[str, Reference] = dict(reference) if isinstance(reference, Mapping) else {}
    reference_images: Mapping[int, Image.Image] = {}
    if reference is not None and not isinstance(reference, Mapping):
        references, reference_images = _measure_reference(
            reference, comparing, identities, request, resources, work, keep_images, failed
        )
    job = build_pass(request.samples, measurements, identities, origin, request, resources, work, keep_images)
    parts = run_pass(job, request.protocol.name, resources.workers)
    found: dict[str, dict[str, Any]] = {}
    for metric_pass in job.metric_passes:
        one = metric_pass.measurement
        if metric_pass not in parts:
            failed.setdefault(one.metric, metric_pass.store.failure() or "")
            continue
        if one.metric in failed:
            continue
        try:
            numbers = _estimates(
                networks, one, parts[metric_pass], references.get(one.metric), request.categories
            )
        except Exception as error:  # as in PassJob: other metrics continue
            failed[one.metric] = str(error) or type(error).__name__
            continue
        settings, digest = _settings(request, one, identities[one], references.get(one.metric))
        for name, estimate in numbers.items():
            found[name] = {**estimate, "hash": digest, "settings": settings}
    statistics, notes = _of_the_images(request, next(iter(parts.values()), None))
    kept = load_kept_images(job) if keep_images else {}
    return EvaluationResult(found | evaluated, kept, reference_images, failed, statistics, notes)


def evaluate_diversity(
    request: EvaluationRequest,
    networks: NetworkCache,
    resources: Resources,
    work: Path,
    failed: dict[str, str],
) -> dict[str, dict[str, Any]]:
    """Measure diversity on several additional images for each of the first prompts.

    Raises:
        UserError: for stored images, which have one image per prompt.
    """
    if not isinstance(request.samples, ModelSamples):
        raise UserError(
            "diversity needs several images of one prompt, which only a --model makes; leave it out of --metrics."
        )
    one = request.protocol.measurement("diversity")
    first = request.samples.prompts[:DIVERSITY_PROMPTS]
    repeated = tuple(prompt for prompt in first for _ in range(IMAGES_PER_PROMPT))
    samples = replace(request.samples, prompts=repeated)
    inner = replace(request, samples=samples, captions=None, categories=None, saved=None)
    identities = {one: networks.identity(one)}
    origin = {**samples.origin(), "each": IMAGES_PER_PROMPT}
    job = build_pass(samples, [one], identities, origin, inner, resources, work)
    parts = run_pass(job, "diversity", resources.workers)
    if not parts:
        failed["diversity"] = job.metric_passes[0].store.failure() or ""
        return {}
    settings, digest = _settings(replace(inner, captions=repeated), one, identities[one], None)
    return {
        name: {**estimate, "hash": digest, "settings": settings}
        for name, estimate in _estimates(networks, one, parts[job.metric_passes[0]], None).items()
    }


def build_pass(
    samples: Samples,
    measurements: Sequence[Measurement],
    identities: Mapping[Measurement, Mapping[str, str]],
    origin: Mapping[str, Any],
    request: EvaluationRequest,
    resources: Resources,
    work: Path,
    keep_images: int = 0,
    real: bool = False,
) -> PassJob:
    """Create the job that runs all networks over a set; its stores are named by a hash of their settings."""
    metric_passes: dict[tuple[str, ...], MetricPass] = {}
    for one in measurements:
        steps = one.reference_steps if real else one.steps
        settings = {
            **origin,
            "network": dict(identities[one]),
            "words": one.network,
            "steps": list(steps),
            "versions": versions(),
            "rows": ROWS_VERSION,
        }
        if one.metric in CAPTION_METRICS and request.captions is not None:
            settings["captions"] = captions_digest(request.captions)
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
        resources.device if resources.workers is None or samples.are_files else resources.workers.device,
        processes,
        kept_images=kept_images,
        keep_images=keep_images,
        real=real,
        saved=None if real else request.saved,
    )


def _open_reference(
    request: EvaluationRequest,
    comparing: Sequence[Measurement],
    identities: Mapping[Measurement, Mapping[str, str]],
) -> Mapping[str, Reference] | NumberedImages | None:
    """The real side: loaded references by metric, or images to measure."""
    if request.known or not comparing:
        return dict(request.known)
    assert request.reference is not None
    if request.reference.endswith(".npz"):
        path = Path(request.reference)
        return {one.metric: read_reference(path, one, identities[one]) for one in comparing}
    return open_images(request.reference)


def _measure_reference(
    images: NumberedImages,
    comparing: Sequence[Measurement],
    identities: Mapping[Measurement, Mapping[str, str]],
    request: EvaluationRequest,
    resources: Resources,
    work: Path,
    keep_images: int,
    failed: dict[str, str],
) -> tuple[dict[str, Reference], Mapping[int, Image.Image]]:
    """Measure the reference of each metric; returns them with the first images."""
    samples = StoredSamples(images)
    job = build_pass(
        samples, comparing, identities, samples.origin(), request, resources, work, keep_images, real=True
    )
    parts = run_pass(job, "reference")
    digest = images.digest()
    for metric_pass in job.metric_passes:
        if metric_pass not in parts:
            failed[metric_pass.measurement.metric] = f"the reference: {metric_pass.store.failure()}"
    found = {
        metric_pass.measurement.metric: Reference(digest, rows=part.rows)
        for metric_pass, part in parts.items()
    }
    return found, load_kept_images(job) if keep_images else {}


def _estimates(
    networks: NetworkCache,
    one: Measurement,
    part: MeasuredBatch,
    reference: Reference | None,
    categories: Sequence[str] | None = None,
) -> dict[str, dict[str, Any]]:
    """Estimates of one metric, also per category for metrics that are means over images."""
    metric = networks.metric(one, reference)
    metric.add(part.rows, torch.arange(len(part.rows)))
    found = {name: estimate.as_dict() for name, estimate in metric.estimates().items()}
    if categories is None or not _is_a_mean(metric):
        return found
    for category in dict.fromkeys(categories):
        rows = torch.tensor([place for place, its in enumerate(categories) if its == category])
        inner = networks.metric(one)
        inner.add(part.rows[rows], rows)
        for name, estimate in inner.estimates().items():
            entry = {key: value for key, value in estimate.as_dict().items() if key != "left_out"}
            found[name].setdefault("categories", {})[category] = entry
    return found


def _is_a_mean(metric: SampledMetric) -> bool:
    return isinstance(metric, PerImageMetric) or metric.names[0] == "caption_accuracy"


def _settings(
    request: EvaluationRequest, one: Measurement, identity: Mapping[str, str], reference: Reference | None
) -> tuple[Mapping[str, Any], str]:
    if request.fingerprint is not None:
        return request.fingerprint[1], request.fingerprint[0]
    # For stored images only metrics that read captions depend on them; generated images always do.
    captions = request.captions
    if one.metric not in CAPTION_METRICS and isinstance(request.samples, StoredSamples):
        captions = None
    settings = hashed_settings(
        request.protocol,
        one,
        identity,
        request.samples.count,
        request.samples.formats,
        None if captions is None else captions_digest(captions),
        None if reference is None else reference.digest,
    )
    return settings, metric_hash(settings)


def _of_the_images(
    request: EvaluationRequest, part: MeasuredBatch | None
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Statistics of image sizes and constant images, and notes about them and the model."""
    if part is None:
        return {}, ()
    sizes = Counter(f"{width} x {height}" for width, height in part.sizes.tolist())
    constant, notes = int(part.constant.sum()), []
    if constant:
        notes.append(
            f"{constant} of {len(part.constant)} images are of one colour, as a safety checker or an overflow leaves them; "
            "every number counts them."
        )
    if len(sizes) > 1:
        notes.append(
            f"The images have {len(sizes)} sizes, most of them {sizes.most_common(1)[0][0]}; each was resized by itself."
        )
    if isinstance(request.samples, ModelSamples):
        switched_off = request.samples.switched_off()
        if switched_off:
            notes.append(f"Off for the measurement: {', '.join(switched_off)} of the model folder.")
    return {"sizes": dict(sizes.most_common(10)), "constant_images": constant}, tuple(notes)


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
    if "diversity" in request.metrics and not isinstance(request.samples, ModelSamples):
        raise UserError(
            "diversity needs several images of one prompt, which only a --model makes; leave it out of --metrics."
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


def _refuse_what_does_not_fit(
    request: EvaluationRequest,
    networks: NetworkCache,
    comparing: Sequence[Measurement],
    reference: Mapping[str, Reference] | NumberedImages | None,
) -> None:
    """Check numbers of images and dimensions of references before measuring."""
    for one in comparing:
        known = reference.get(one.metric) if isinstance(reference, Mapping) else None
        if known is not None:
            networks.require_fit(
                one, request.samples.count, known.count, known, request.reference or known.digest
            )
        else:
            real = len(reference.names) if reference is not None and not isinstance(reference, Mapping) else 0
            networks.require_fit(one, request.samples.count, real)
