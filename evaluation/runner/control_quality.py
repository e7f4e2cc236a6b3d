"""What a ControlNet costs: the protocol's metrics of image quality, beside its adherence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evaluation.metrics.estimates import Estimate
from evaluation.metrics.sampled import SampledMetric
from evaluation.protocols.image_protocol import Measurement, hashed_settings
from evaluation.protocols.metric_table import NetworkCache
from evaluation.protocols.names import REFERENCE_METRICS, parse_weights
from evaluation.protocols.protocols import Protocol, find_protocol
from evaluation.protocols.references import Reference, read_reference
from evaluation.runner.scores import ProtocolNetworks, Scores, ToyMetrics
from sdxs_lightning.core.errors import UserError

Estimates = dict[str, Estimate]
"""By name of the metric."""


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
        self.protocol = found
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

    def settings(self, samples: int, prompts: str) -> dict[str, Any]:
        """What each metric depends on besides the images, by name.

        Args:
            samples: number of images.
            prompts: digest of their captions.
        """
        if isinstance(self.protocol, Protocol):
            described = {"protocol": self.protocol.name, "fingerprint": self.protocol.fingerprint()}
            own = {"of_the_protocol": described, "samples": samples, "captions": prompts}
            return dict.fromkeys((one.name for one in fields(Scores)), own)
        found: dict[str, Any] = {}
        for one in self._measurements:
            reference = self._references.get(one.metric)
            settings = hashed_settings(
                self.protocol,
                one,
                self._networks.identity(one),
                samples,
                "lossless",
                prompts,
                None if reference is None else reference.digest,
            )
            found |= dict.fromkeys(self._networks.metric(one, reference).names, settings)
        return found


@dataclass(frozen=True)
class ToyQuality:
    """FID, CLIP score and caption accuracy of the toy world."""

    metrics: ToyMetrics

    def update(self, images_uint8: Tensor, captions: Sequence[str], sample_ids: Tensor) -> None:
        self.metrics.update(images_uint8, captions)

    def compute(self) -> dict[str, float]:
        return self.metrics.compute().as_dict()

    def estimates(self) -> Estimates:
        return self.metrics.estimates()


@dataclass(frozen=True)
class ImageQuality:
    """Metrics of an image protocol; none are measured unless `--metrics` names some."""

    measurements: Sequence[Measurement]
    metrics: Sequence[SampledMetric]

    def update(self, images_uint8: Tensor, captions: Sequence[str], sample_ids: Tensor) -> None:
        from evaluation.callbacks.image_metrics import add_images

        add_images(self.measurements, self.metrics, images_uint8, captions, sample_ids)

    def compute(self) -> dict[str, float]:
        return {name: one.value for name, one in self.estimates().items()}

    def estimates(self) -> Estimates:
        return {name: one for metric in self.metrics for name, one in metric.estimates().items()}
