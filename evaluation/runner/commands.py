"""Implementation of the commands `evaluation.evaluate` and `evaluation.reference`."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from data.prepare.common.machine import choose_device
from data.prepare.common.settings_file import write_text
from data.prepare.common.shared_work import workforce
from evaluation.images.image_sets import open_images
from evaluation.images.samples import ModelSamples, StoredSamples
from evaluation.networks.frozen_clip import FrozenClip
from evaluation.protocols.image_protocol import ImageProtocol
from evaluation.protocols.metric_table import shared_networks
from evaluation.protocols.names import REFERENCE_METRICS, parse_weights
from evaluation.protocols.protocols import Protocol, find_protocol
from evaluation.protocols.references import write_reference
from evaluation.reports.html_report import write_html
from evaluation.reports.markdown import result_markdown
from evaluation.runner.control import evaluate_control
from evaluation.runner.evaluator import (
    EvaluationRequest,
    EvaluationResult,
    Resources,
    build_pass,
    run_evaluation,
)
from evaluation.runner.machine import milliseconds_per_image, where
from evaluation.runner.passes import run_pass
from evaluation.runner.requests import build_request
from evaluation.runner.scores import measure_reference
from evaluation.user_errors import as_user_errors
from sdxs_lightning.core.errors import UserError

if TYPE_CHECKING:
    from evaluation.evaluate import EvaluateOptions
    from evaluation.reference import ReferenceOptions


@as_user_errors()
def evaluate(options: EvaluateOptions) -> str:
    """Measure, write FILE.json, FILE.md and FILE.html, and return the result as Markdown."""
    if options.control is not None:
        return evaluate_control(options)
    started = time.perf_counter()
    # With Ray this machine reads the reference, and need not have the GPUs.
    device = choose_device("auto" if options.ray is not None and options.device == "cuda" else options.device)
    request = build_request(options)
    if isinstance(request.samples, ModelSamples):
        request.samples.check()
    with ExitStack() as stack:
        work = options.work or (options.out and options.out.with_suffix(".work"))
        work = work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="evaluation-")))
        workers = None if options.ray is None else stack.enter_context(workforce(options.hardware))
        resources = Resources(device, options.processes, options.batch_size, workers)
        evaluated = run_evaluation(request, resources, work, options.report_images)
    reasons = "; ".join(f"{name}: {reason}" for name, reason in evaluated.failed.items())
    if not evaluated.metrics:
        raise UserError(reasons)
    result = _result_content(options, request, evaluated, torch.device(device))
    if workers is not None:
        result["device"] = f"tasks of a Ray cluster, on {workers.device}"
    result["seconds"] = round(time.perf_counter() - started, 1)
    page = (
        "\n".join([result_markdown(result).rstrip("\n"), *(f"\n{note}" for note in evaluated.notes)]) + "\n"
    )
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        # Atomically: commands that share an evaluation write them at the same time.
        write_text(options.out, json.dumps(result, indent=2) + "\n")
        write_text(options.out.with_suffix(".md"), page)
        html = options.out.with_suffix(".html")
        write_html(html, result, evaluated.images, request.captions, evaluated.reference_images)
    if evaluated.failed:
        sys.stdout.write(page)
        raise UserError(f"{len(evaluated.failed)} of the metrics failed, the others are kept ({reasons})")
    return page.rstrip("\n")


def _result_content(
    options: EvaluateOptions, request: EvaluationRequest, evaluated: EvaluationResult, device: torch.device
) -> dict[str, Any]:
    """Content of FILE.json: images, metrics and settings."""
    result: dict[str, Any] = {}
    if isinstance(request.samples, ModelSamples):
        result |= {"model": options.model, **request.samples.origin()}
    else:
        result |= {"images": options.images, **request.samples.origin(), "formats": request.samples.formats}
    result |= {name: entry["value"] for name, entry in evaluated.metrics.items()}
    result["samples"] = request.samples.count
    # With Ray the device that makes the images need not be here.
    if isinstance(request.samples, ModelSamples) and request.captions and options.ray is None:
        maker = request.samples.maker(device)
        result["ms_per_image"] = milliseconds_per_image(maker, request.captions[0])
    named = {"name": request.protocol.name, "version": request.protocol.version}
    source = {"source": request.protocol.source}
    result["protocol"] = {**(named if request.fingerprint is None else request.fingerprint[1]), **source}
    result["image_statistics"] = dict(evaluated.image_statistics)
    result |= {"notes": list(evaluated.notes)} if evaluated.notes else {}
    result |= {"failed": dict(evaluated.failed)} if evaluated.failed else {}
    return {**result, "metrics": evaluated.metrics, **where(device)}


@as_user_errors()
def reference(options: ReferenceOptions) -> str:
    """Measure the real images of each protocol; returns the summary of the written files."""
    written = []
    for name in options.protocol:
        protocol = find_protocol(name)
        if isinstance(protocol, Protocol):
            statistics = measure_reference(protocol, FrozenClip(protocol.path(protocol.clip)))
            statistics.save(protocol.path(protocol.reference))
            source = f"{statistics.count} images of the {protocol.split} split"
            written.append(f"{name}: {source} -> {protocol.reference}")
        else:
            written.append(_image_reference(protocol, options))
    return "\n".join(written)


def _image_reference(protocol: ImageProtocol, options: ReferenceOptions) -> str:
    """Write the reference files of an image protocol."""
    assert options.images is not None and options.out is not None
    own = [one.metric for one in protocol.measurements if one.metric in REFERENCE_METRICS]
    measurements = [protocol.measurement(name) for name in options.metrics or own]
    weights = tuple(sorted(parse_weights(text) for text in options.weights))
    networks = shared_networks(weights)
    identities = {one: networks.identity(one) for one in measurements}
    samples = StoredSamples(open_images(options.images))
    resources = Resources(choose_device(options.device), options.processes, options.batch_size)
    request = EvaluationRequest(protocol, samples, tuple(one.metric for one in measurements), weights=weights)
    with tempfile.TemporaryDirectory(prefix="reference-") as temporary:
        work = options.work or Path(temporary)
        origin = samples.origin()
        job = build_pass(samples, measurements, identities, origin, request, resources, work, real=True)
        parts = run_pass(job, "reference")
    for metric_pass in job.metric_passes:
        if metric_pass not in parts:
            raise UserError(f"{metric_pass.measurement.metric}: {metric_pass.store.failure()}")
    digest, files = samples.source.digest(), []
    for metric_pass, part in parts.items():
        one = metric_pass.measurement
        files.append(write_reference(options.out, one, identities[one], part.rows, digest))
    return f"{protocol.name}: {samples.count} images -> {', '.join(map(str, files))}"
