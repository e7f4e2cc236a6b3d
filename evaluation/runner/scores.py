"""Metrics of a toy protocol over the images of an image maker."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from data.toy.training.classifier import AttributeClassifier
from evaluation.images.generate import ImageMaker, RealImages, rank_batches
from evaluation.metrics.caption_accuracy import CaptionAccuracy, Classifier
from evaluation.metrics.clip_score import ClipScore
from evaluation.metrics.estimates import Estimate
from evaluation.metrics.frechet import FeatureStatistics, FrechetDistance
from evaluation.metrics.shape_score import ShapeScore
from evaluation.networks.frozen_clip import FrozenClip
from evaluation.protocols.protocols import Protocol


@dataclass(frozen=True)
class Scores:
    """Scores of a set of images."""

    fid: float
    """Frechet distance to the protocol's reference in CLIP image features; lower is better."""
    clip_score: float
    """100 * cos."""
    caption_accuracy: float
    """Share of images with all stated attributes correct, in [0, 1]."""
    attribute_accuracy: float
    """Share of stated attributes that are correct, in [0, 1]."""
    shape_score: float
    """Mean similarity of the objects with the renderer's masks of the stated shapes, in [0, 1]."""
    clean_images: float
    """Share of images with every object cleanly drawn, in [0, 1]."""

    def as_dict(self) -> dict[str, float]:
        """Dict for JSON and loggers."""
        return asdict(self)


@dataclass(frozen=True)
class ProtocolNetworks:
    """Frozen networks and reference statistics of a protocol, shared by many measurements."""

    clip: FrozenClip
    classifier: Classifier
    reference: FeatureStatistics

    @classmethod
    def load(cls, protocol: Protocol) -> ProtocolNetworks:
        """Load from the protocol's paths.

        Raises:
            FileNotFoundError: if one is missing.
            ValueError: if the reference was measured under another protocol.
        """
        clip = FrozenClip(protocol.path(protocol.clip))
        classifier = AttributeClassifier.from_pretrained(protocol.path(protocol.classifier))
        reference = FeatureStatistics.load(protocol.path(protocol.reference), protocol.reference_origin())
        return cls(clip, classifier, reference)


class ToyMetrics:
    """The metrics of a protocol, updated together. Not an nn.Module, so checkpoints do not include it."""

    def __init__(self, networks: ProtocolNetworks, device: torch.device) -> None:
        clip = networks.clip
        self.fid = FrechetDistance(clip.image_features, clip.dimensions, networks.reference).to(device)
        self.clip_score = ClipScore(clip).to(device)
        self.caption_accuracy = CaptionAccuracy(networks.classifier).to(device)
        self.shape_score = ShapeScore().to(device)

    def update(self, images_uint8: Tensor, captions: Sequence[str]) -> None:
        """Add images with their captions."""
        self.fid.update(images_uint8)
        self.clip_score.update(images_uint8, captions)
        self.caption_accuracy.update(images_uint8, captions)
        self.shape_score.update(images_uint8, captions)

    def compute(self) -> Scores:
        """Scores over all ranks; collective."""
        accuracy, shapes = self.caption_accuracy.compute(), self.shape_score.compute()
        return Scores(
            fid=float(self.fid.compute()),
            clip_score=float(self.clip_score.compute()),
            caption_accuracy=float(accuracy["all"]),
            attribute_accuracy=float(accuracy["attributes"]),
            shape_score=float(shapes["shape_score"]),
            clean_images=float(shapes["clean_images"]),
        )

    def estimates(self) -> dict[str, Estimate]:
        """The scores over all ranks with their intervals, by name; collective."""
        metrics = self.fid, self.clip_score, self.caption_accuracy, self.shape_score
        return {name: one for metric in metrics for name, one in metric.estimates().items()}


def score_images(
    maker: ImageMaker,
    captions: Sequence[str],
    networks: ProtocolNetworks,
    device: torch.device,
    batch_size: int = 100,
    rank: int = 0,
    world_size: int = 1,
    advance: Callable[[int], Any] = lambda images: None,
) -> Scores:
    """Generate one image per caption and score them; collective for several ranks.

    Args:
        maker: generates the images.
        captions: caption of each sample.
        networks: networks of the protocol.
        device: device of the metric states.
        batch_size: images per call and rank; scores do not depend on it beyond rounding.
        rank: rank of this process.
        world_size: number of processes that share the samples.
        advance: called with the number of images after each batch.
    """
    board = ToyMetrics(networks, device)
    for sample_ids, counting in rank_batches(len(captions), batch_size, rank, world_size):
        texts = [captions[index] for index in sample_ids.tolist()]
        images = maker(texts, sample_ids)[:counting]
        board.update(images, texts[:counting])
        advance(counting)
    return board.compute()


def measure_reference(protocol: Protocol, clip: FrozenClip, batch_size: int = 200) -> FeatureStatistics:
    """Statistics of the protocol's real images."""
    real = RealImages(protocol.split)
    batches = torch.arange(protocol.reference_samples).split(batch_size)
    features = torch.cat([clip.image_features(real([], sample_ids)) for sample_ids in batches])
    return FeatureStatistics.from_features(features, protocol.reference_origin())
