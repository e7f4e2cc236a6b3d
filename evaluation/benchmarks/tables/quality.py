"""Scores of the toy base in many and few steps, and of students, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from data.toy.training.classifier import AttributeClassifier
from data.toy.world import captions
from evaluation.benchmarks.tables.score_files import KeptRows, named_folders
from evaluation.benchmarks.tables.scores import student_images
from evaluation.images.generate import ImageMaker, RealImages, Reconstructions
from evaluation.metrics.caption_accuracy import CaptionAccuracy
from evaluation.metrics.kernel_distance import KernelDistance
from evaluation.metrics.precision_recall import PrecisionRecall
from evaluation.metrics.sampled import SampledMetric
from evaluation.metrics.shape_score import ShapeScore
from evaluation.protocols.protocols import Protocol, get_protocol
from evaluation.runner.machine import where
from evaluation.runner.teacher_scores import Teacher
from evaluation.user_errors import as_user_errors
from sdxs_lightning.core.model_hash import hash_weights
from sdxs_lightning.families.sd import StableDiffusion
from sdxs_lightning.inference.generator import torch_device

if TYPE_CHECKING:
    from evaluation.benchmarks.tables.options import QualityOptions

KERNEL_SUBSET = 1000
ORDERED_BY = "shape_score"
"""The score whose intervals say whether two rows are told apart."""


class Features:
    """The attribute classifier's last features of an image, each divided by its standard deviation over real images.

    Args:
        classifier: the network.
        real: (n, d), its features of real images, not yet divided.
    """

    def __init__(self, classifier: AttributeClassifier, real: Tensor) -> None:
        self.classifier, self.scale = classifier, real.std(dim=0)
        self.real = real / self.scale

    def __call__(self, images_uint8: Tensor) -> Tensor:
        return classifier_features(self.classifier, images_uint8) / self.scale


@torch.no_grad()
def classifier_features(classifier: AttributeClassifier, images_uint8: Tensor) -> Tensor:
    """(B, 96), float32, of (B, 3, 32, 32) uint8 images."""
    features: Tensor = classifier.features(images_uint8.float() / 127.5 - 1)
    return features


@as_user_errors()
def quality(options: QualityOptions) -> str:
    """Measure rows that are missing or whose weights have changed."""
    protocol = get_protocol("toy", samples=options.samples)
    settings = {"protocol": protocol.describe(), "guidance_scale": options.guidance_scale}
    device = torch_device(options.device)
    kept = KeptRows(
        options.out,
        settings,
        lambda rows: {**settings, "ordered_by": ORDERED_BY, "rows": rows, **where(device)},
    )
    measure = Measurer(protocol, device, options.batch_size)
    for label, (digest, maker, prompts) in makers(options, protocol, device).items():
        row = kept.known.get(label, {})
        if row.get("weights_sha256") != digest:
            row = {"weights_sha256": digest, "estimates": measure(maker, prompts)}
        kept.add(label, row)
    return kept.finish()


def makers(
    options: QualityOptions, protocol: Protocol, device: torch.device
) -> dict[str, tuple[str, ImageMaker, Sequence[str]]]:
    """Hash of the weights, image maker and prompts of each row, in the order in which quality should rise or fall."""
    family = StableDiffusion(options.base).to(device)
    teacher = Teacher(family, device, options.guidance_scale, seed=protocol.seed)
    real = RealImages(protocol.fresh_split, device)
    fresh, prompts = captions(protocol.fresh_split, protocol.samples), protocol.captions()
    base = hash_weights(family.folder)
    found: dict[str, tuple[str, ImageMaker, Sequence[str]]] = {
        "real images": ("", real, fresh),
        "autoencoder": (base, Reconstructions(real, family.load_vae().to(device).eval()), fresh),
    }
    for count in sorted(options.steps, reverse=True):
        found[f"base, {count} step{'s' * (count > 1)}"] = base, teacher.images(count), prompts
    example = "late=outputs/quickstart/pipeline"
    for name, folder in named_folders("--student", example, options.student, found).items():
        found[name] = hash_weights(folder), student_images(Path(folder), protocol, device), prompts
    return found


class Measurer:
    """Estimates of all scores of an image maker, by name.

    Args:
        protocol: a toy protocol.
        device: of the networks.
        batch_size: images at once.
    """

    def __init__(self, protocol: Protocol, device: torch.device, batch_size: int) -> None:
        self.batch_size = batch_size
        self.classifier = AttributeClassifier.from_pretrained(protocol.path(protocol.classifier)).to(device)
        real = RealImages("train", device)
        batches = torch.arange(protocol.samples).split(batch_size)
        rows = [classifier_features(self.classifier, real([], numbers)) for numbers in batches]
        self.features = Features(self.classifier, torch.cat(rows))

    def __call__(self, maker: ImageMaker, prompts: Sequence[str]) -> dict[str, dict[str, float]]:
        real = self.features.real
        subset = min(KERNEL_SUBSET, len(prompts))
        metrics: list[SampledMetric] = [
            ShapeScore(),
            CaptionAccuracy(self.classifier),
            KernelDistance(self.features, real, subsets=20, subset_size=subset),
            PrecisionRecall(self.features, real),
        ]
        for numbers in torch.arange(len(prompts)).split(self.batch_size):
            texts = [prompts[number] for number in numbers.tolist()]
            images = maker(texts, numbers)
            for metric in metrics:
                metric.update(images, texts, numbers)
        return {
            name: estimate.as_dict() for metric in metrics for name, estimate in metric.estimates().items()
        }
