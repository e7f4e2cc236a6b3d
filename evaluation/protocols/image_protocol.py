"""Protocols for images of any source, and the hashes of their metrics."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from sdxs_lightning.core.errors import UserError

Steps = tuple[str, ...]


@dataclass(frozen=True)
class Measurement:
    """A metric with its network and image processing."""

    metric: str
    """`fid`, `clip_score`, ...: one of evaluation/protocols/names.py."""
    network: str
    """Network as KIND:NAME, see evaluation/protocols/metric_table.py."""
    steps: Steps = ()
    """Steps for generated images, see evaluation/networks/image_steps.py."""
    reference_steps: Steps = ()
    """Steps for reference images."""


@dataclass(frozen=True)
class ImageProtocol:
    """A named measurement of images of any source; the toy world has its own protocols in evaluation/protocols/protocols.py.

    Common to all: noise of sample i is seeded by (seed, i), images are clamped and rounded to bytes, features are float32
    without autocast, sums float64, covariance over n - 1.
    """

    name: str
    """Name of the protocol."""
    measurements: tuple[Measurement, ...]
    """Default metrics; `--metrics` overrides them."""
    samples: int | None = None
    """Number of images; None takes all. FID decreases with it, so it is part of the hash."""
    image_px: int | None = None
    """Side length of generated images; None is the model's default."""
    lossless: bool = False
    """Whether generated images must not be JPEG files."""
    inception: str = "inception:clean"
    """Inception network of metrics that the protocol does not list."""
    seed: int = 0
    """Seed of a model's noise. Not part of the hash, so that images from other random generators are comparable."""
    version: int = 2
    """Incremented by every change that affects results."""
    source: str = field(default="", compare=False)
    """Source of the protocol and deviations from it."""

    def measurement(self, metric: str) -> Measurement:
        """The measurement of a metric: as listed, or with the default network and the image steps of FID.

        Raises:
            UserError: for an unknown metric.
        """
        own = {one.metric: one for one in self.measurements}
        if metric in own:
            return own[metric]
        if metric == "precision_recall" and self.inception == "inception:torch-fidelity":
            raise UserError(
                "torch-fidelity measures precision and recall in the features of a VGG-16, which is not here; --protocol clean "
                "measures them in those of Inception, which is another number."
            )
        networks = DEFAULT_NETWORKS | dict.fromkeys(INCEPTION_METRICS, self.inception)
        if metric not in networks:
            raise UserError(f"no metric named '{metric}'; there are {', '.join(sorted(networks))}.")
        if metric == "patch_fid":
            return Measurement(metric, self.inception, ("crop 299",), ("crop 299",))
        if metric == "diversity":  # uses the features of FID in toy protocols
            network = own["fid"].network if "fid" in own else networks[metric]
            return Measurement(metric, network if network.startswith("clip_image") else networks[metric])
        steps = own.get("fid", Measurement("fid", self.inception))
        return Measurement(metric, networks[metric], steps.steps, steps.reference_steps)


INCEPTION_METRICS = ("fid", "patch_fid", "kid", "precision_recall")
DEFAULT_NETWORKS = {
    "inception_score": "inception_logits:torch-fidelity",
    "aesthetic": "aesthetic:laion",
    "fd_dinov2": "dinov2:facebook/dinov2-large",
    "cmmd": "clip_unit:vit-l-14-336",
    "clip_score": "clip_text:vit-g-14-s12b",
    "diversity": "clip_image:vit-l-14",
    "pickscore": "pickscore:pickscore",
    "hpsv2": "hpsv2:hpsv2",
}
"""Networks of metrics that a protocol does not list."""


def metric_hash(settings: Mapping[str, Any]) -> str:
    """12-digit hex hash of everything that a metric depends on besides the images."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def hashed_settings(
    protocol: ImageProtocol,
    measurement: Measurement,
    identity: Mapping[str, str],
    samples: int,
    formats: str,
    captions: str | None,
    reference: str | None,
) -> dict[str, Any]:
    """Settings that enter the hash of a metric; stored beside it, so that differences between results can be reported.

    Args:
        protocol: the protocol.
        measurement: the metric.
        identity: identity of the network: name, hash of its weights, preprocessing.
        samples: number of images.
        formats: `lossless`, or the file extensions.
        captions: digest of the captions, if the metric reads them.
        reference: digest of the reference set, if any.
    """
    return {
        "protocol": protocol.name,
        "version": protocol.version,
        **{
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(measurement).items()
        },
        "network": dict(identity),
        "samples": samples,
        "formats": formats,
        "captions": captions,
        "reference": reference,
    }
