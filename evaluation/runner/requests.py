"""Builds an EvaluationRequest from command options, with error messages for invalid combinations."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from evaluation.images.image_sets import open_images
from evaluation.images.prompt_files import read_prompts
from evaluation.images.prompt_list import PromptList, without_ending
from evaluation.images.samples import ModelSamples, Samples, StoredSamples
from evaluation.images.saved_images import SavedImages
from evaluation.metrics.frechet import FeatureStatistics
from evaluation.protocols.image_protocol import ImageProtocol, Measurement
from evaluation.protocols.names import CAPTION_METRICS, parse_weights
from evaluation.protocols.protocols import Protocol, find_protocol, get_protocol
from evaluation.protocols.references import Reference
from evaluation.runner.evaluator import EvaluationRequest
from sdxs_lightning.core.errors import UserError

if TYPE_CHECKING:
    from evaluation.evaluate import EvaluateOptions


def build_request(options: EvaluateOptions) -> EvaluationRequest:
    """Build the request.

    Raises:
        UserError: for options that contradict each other or their files.
    """
    weights = tuple(sorted(parse_weights(text) for text in options.weights))
    protocol = find_protocol(options.protocol)
    if isinstance(protocol, Protocol):
        return toy_request(options, weights)
    return image_request(options, protocol, weights)


def as_image_protocol(protocol: Protocol) -> ImageProtocol:
    """Convert a toy protocol to an ImageProtocol."""
    return ImageProtocol(
        protocol.name,
        (
            Measurement("fid", f"clip_image:{protocol.clip}"),
            Measurement("clip_score", f"clip_text:{protocol.clip}"),
            Measurement("caption_accuracy", f"attributes:{protocol.classifier}"),
            Measurement("shape_score", "renderer:toy"),
        ),
        samples=protocol.samples,
        seed=protocol.seed,
        source="the toy world's own networks, on its own held-out prompts",
    )


def toy_request(options: EvaluateOptions, weights: tuple[tuple[str, str], ...]) -> EvaluationRequest:
    """Request for a model under a toy protocol, which defines prompts, networks and reference.

    Raises:
        UserError: for options that toy protocols do not support.
    """
    protocol = get_protocol(options.protocol, samples=options.samples)
    given = [name for name in ("captions", "reference", "weights") if getattr(options, name)]
    if options.model is None or given:
        raise UserError(
            f"protocol {protocol.name} is the toy world's own: it measures a --model and brings captions, reference and "
            f"networks{f', so leave out --{given[0]}' if given else ''}; for other images choose another --protocol."
        )
    statistics = FeatureStatistics.load(protocol.path(protocol.reference), protocol.reference_origin())
    inner = as_image_protocol(protocol)
    prompts = tuple(protocol.captions())
    return EvaluationRequest(
        inner,
        model_samples(options, inner, prompts),
        selected_metrics(options, inner),
        captions=prompts,
        saved=saved_images(options, PromptList(prompts)),
        known={"fid": Reference(protocol.reference, statistics)},
        weights=weights,
        fingerprint=(protocol.fingerprint(), protocol.describe()),
    )


def image_request(
    options: EvaluateOptions, protocol: ImageProtocol, weights: tuple[tuple[str, str], ...]
) -> EvaluationRequest:
    """Request for a model or a set of images under an image protocol."""
    file = options.captions or ""
    prompts = read_prompts(file) if file else None
    metrics = selected_metrics(options, protocol)
    for name in metrics:
        protocol.measurement(name)  # raises for unsupported metrics before any image is read
    if options.samples is not None:
        protocol = replace(protocol, samples=options.samples)
    samples: Samples
    chosen: PromptList | None = None
    saved = None
    if options.model is not None:
        if prompts is None:
            raise UserError(
                "--model needs --captions: a file of prompts, such as COCO's captions_val2014.json."
            )
        chosen = prompts.selection(protocol.samples, file)
        samples = model_samples(options, protocol, chosen.captions)
        saved = saved_images(options, chosen)
    else:
        samples = stored_samples(options, protocol)
        names = samples.source.names[: samples.count]
        if prompts is not None:
            chosen = prompts.for_images(names, file)
        elif any(name in CAPTION_METRICS for name in metrics):
            held = samples.source.captions()
            chosen = None if held is None else PromptList(tuple(held[: samples.count]))
    return EvaluationRequest(
        protocol,
        samples,
        metrics,
        None if chosen is None else chosen.captions,
        options.reference,
        weights=weights,
        categories=None if chosen is None else chosen.categories,
        saved=saved,
    )


def saved_images(options: EvaluateOptions, prompts: PromptList) -> SavedImages | None:
    """The folder of `--save_images`, in the layout of `--save_layout`."""
    if options.save_images is None:
        return None
    names = None
    if prompts.names is not None and prompts.origin != "coco":
        stems = tuple(without_ending(name) for name in prompts.names)
        names = (
            stems if len(set(stems)) == len(stems) else None
        )  # numbers if several prompts share an image name
    return SavedImages(
        str(options.save_images), prompts.captions, names, prompts.records, options.save_layout
    )


def model_samples(
    options: EvaluateOptions, protocol: ImageProtocol, prompts: tuple[str, ...]
) -> ModelSamples:
    """Samples generated by a model folder."""
    assert options.model is not None
    return ModelSamples(
        options.model,
        prompts,
        len(options.timesteps) or options.steps,
        options.guidance_scale,
        protocol.seed if options.seed is None else options.seed,
        options.image_px or protocol.image_px,
        options.precision,
        options.scheduler,
        options.timesteps,
        options.lora,
        options.lora_scale,
    )


def stored_samples(options: EvaluateOptions, protocol: ImageProtocol) -> StoredSamples:
    """Samples from the given images, as many as the protocol takes.

    Raises:
        UserError: for a wrong number of images.
    """
    assert options.images is not None
    source = open_images(options.images)
    there, wanted = len(source.names), protocol.samples
    if wanted is not None and there != wanted and (options.samples is None or there < wanted):
        raise UserError(
            f"'{options.images}' holds {there} images, but protocol {protocol.name} measures {wanted}; give --samples "
            f"{min(there, wanted)} to measure as many of them, under another hash."
        )
    return StoredSamples(source, wanted)


def selected_metrics(options: EvaluateOptions, protocol: ImageProtocol) -> tuple[str, ...]:
    """The metrics of `--metrics`, or the protocol's."""
    return tuple(options.metrics or (one.metric for one in protocol.measurements))
