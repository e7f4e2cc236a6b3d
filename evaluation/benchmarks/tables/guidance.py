"""Scores a student with the guidance scale as an input on the toy world, by scale, without and with negative prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from data.toy.attributes import CLASSES
from data.toy.training.classifier import AttributeClassifier
from data.toy.world import parse_caption
from evaluation.benchmarks.tables.score_files import KeptRows
from evaluation.benchmarks.tables.scores import SHEET_COLUMNS, Scorer
from evaluation.images.samples import PipelineImages, load_pipeline, move_pipeline
from evaluation.metrics.caption_accuracy import CaptionAccuracy
from evaluation.metrics.diversity import diversity
from evaluation.metrics.estimates import share_estimate
from evaluation.protocols.protocols import get_protocol
from evaluation.reports.grids import sheet
from evaluation.runner.machine import where
from evaluation.user_errors import as_user_errors
from sdxs_lightning.core.latents import from_uint8
from sdxs_lightning.core.model_hash import hash_model
from sdxs_lightning.networks.guidance_input import check_scale_is_learnt, learns_negative_prompts

if TYPE_CHECKING:
    from evaluation.benchmarks.tables.options import GuidanceOptions

BACKGROUND = "background"


@as_user_errors()
def guidance(options: GuidanceOptions) -> str:
    """Scores each scale, without and with negative prompts if those were learnt; existing scores of the same files are kept."""
    protocol = get_protocol(options.protocol, samples=options.samples)
    scorer = Scorer(protocol, options)
    models = [one for one in (options.student, options.base) if one is not None]
    settings: dict[str, Any] = {
        "models_sha256": [hash_model(one) for one in models],
        "base_steps": options.base_steps,
        "diversity_prompts": options.diversity_prompts,
        "protocol": protocol.describe(),
    }
    kept = KeptRows(options.out, settings, lambda rows: {**settings, "rows": rows, **where(scorer.device)})
    classifier = AttributeClassifier.from_pretrained(protocol.path(protocol.classifier)).to(scorer.device)
    prompts = protocol.captions()
    few = prompts[: options.diversity_prompts]
    examples: dict[str, Tensor] = {}
    for name, maker in _makers(options, protocol.seed, scorer.device):
        negative = f"{name}, negative prompt"
        row = kept.known.get(name) or {
            **scorer(name, maker, prompts),
            "diversity": diversity(maker, few, scorer.networks.clip),
        }
        kept.add(name, row)
        if learns_negative_prompts(maker.pipeline.unet.config):
            row = kept.known.get(negative) or removed(maker, prompts, classifier, options.batch_size)
            kept.add(negative, row)
        if options.sheet is not None:
            examples |= _examples(name, maker, prompts, classifier)
    if options.sheet is not None:
        sheet(examples, _pairs(prompts)[0][:SHEET_COLUMNS]).save(options.sheet)
    return kept.finish()


def removed(
    maker: PipelineImages, prompts: Sequence[str], classifier: AttributeClassifier, batch_size: int
) -> dict[str, Any]:
    """What negative prompts of the images' own backgrounds do.

    Args:
        maker: makes the images.
        prompts: captions; those of two objects are drawn.
        classifier: sees the background.
        batch_size: images at once.

    Returns:
        `removed`: share of the images that have another background under the negative prompt, with its 95 % interval;
        `caption_accuracy`: share of those images with all attributes of their caption; `samples`: their number.
    """
    pairs, ids = _pairs(prompts)
    captions, changed = CaptionAccuracy(classifier), []
    for rows in torch.arange(len(pairs)).split(batch_size):
        texts, numbers = [pairs[row] for row in rows.tolist()], ids[rows]
        before = backgrounds(maker(texts, numbers), classifier)
        images = maker(texts, numbers, _stating(prompts, before))
        changed += [after != own for after, own in zip(backgrounds(images, classifier), before, strict=True)]
        captions.update(images, texts)
    share = share_estimate(torch.tensor(changed))
    return {
        "removed": share.value,
        "caption_accuracy": captions.estimate()["caption_accuracy"].value,
        "samples": len(pairs),
        "intervals": {"removed": [share.low, share.high]},
    }


@torch.no_grad()
def backgrounds(images_uint8: Tensor, classifier: AttributeClassifier) -> list[str]:
    """The background that the classifier sees in each image (B, 3, 32, 32), uint8."""
    logits = classifier(from_uint8(images_uint8))[list(CLASSES).index(BACKGROUND)]
    return [CLASSES[BACKGROUND][seen] for seen in logits.argmax(dim=1).tolist()]


def _pairs(prompts: Sequence[str]) -> tuple[list[str], Tensor]:
    """The captions of two objects, which do not state the background, and their numbers."""
    numbers = [i for i, prompt in enumerate(prompts) if parse_caption(prompt).background is None]
    return [prompts[i] for i in numbers], torch.tensor(numbers)


def _stating(prompts: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """For each background the first caption that states it."""
    first: dict[str, str] = {}
    for prompt in prompts:
        background = parse_caption(prompt).background
        if background is not None:
            first.setdefault(background, prompt)
    missing = sorted(set(wanted) - first.keys())
    if missing:
        raise ValueError(f"no caption states the background {missing[0]}; give more --samples.")
    return [first[background] for background in wanted]


def _makers(
    options: GuidanceOptions, seed: int, device: torch.device
) -> Iterator[tuple[str, PipelineImages]]:
    for folder, steps, label in ((options.student, 1, ""), (options.base, options.base_steps, "base, ")):
        if folder is None:
            continue
        pipeline = load_pipeline(folder)
        if not label and pipeline.unet.config.get("time_cond_proj_dim") is None:
            raise ValueError(
                f"--student {folder} does not take the guidance scale as an input; train it with student.guidance, as "
                "configs/toy/guidance_input.yaml does."
            )
        for scale in options.scales:
            check_scale_is_learnt(pipeline.unet.config, scale, "--scales")
        move_pipeline(pipeline, device, torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        for scale in options.scales:
            yield f"{label}guidance {scale:g}", PipelineImages(pipeline, steps, scale, seed)


def _examples(
    name: str, maker: PipelineImages, prompts: Sequence[str], classifier: AttributeClassifier
) -> dict[str, Tensor]:
    pairs, ids = _pairs(prompts)
    texts, numbers = pairs[:SHEET_COLUMNS], ids[:SHEET_COLUMNS]
    images = {name: maker(texts, numbers)}
    if learns_negative_prompts(maker.pipeline.unet.config):
        negative = _stating(prompts, backgrounds(images[name], classifier))
        images[f"{name}\nnegative"] = maker(texts, numbers, negative)
    return images
