"""What a protocol of published images fixes, and the hash that its numbers carry."""

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
    """One metric: its network, and the image processing in front."""

    metric: str
    """`fid`, `clip_score`, ...: one of evaluation/protocols/names.py."""
    network: str
    """The network, KIND:NAME as in evaluation/protocols/metric_table.py."""
    steps: Steps = ()
    """Image steps of a generated image, as in evaluation/networks/image_steps.py."""
    reference_steps: Steps = ()
    """The same for a reference image."""


@dataclass(frozen=True)
class ImageProtocol:
    """A named way to obtain numbers from images of any kind; the toy world has its own in evaluation/protocols/protocols.py.

    Always so: noise of sample i is seeded by (seed, i), images are clamped and rounded to bytes, features are float32
    without autocast, sums float64, covariance over n - 1.
    """

    name: str
    """Stands in every result."""
    measurements: tuple[Measurement, ...]
    """What it measures by default; `--metrics` names others."""
    samples: int | None = None
    """How many images; None takes all that are given. FID falls with it, so it is part of the hash."""
    image_px: int | None = None
    """Side of the images that a model makes; None is the model's own."""
    lossless: bool = False
    """Refuses generated images that come from JPEG files."""
    inception: str = "inception:clean"
    """The Inception network of metrics that the protocol does not name."""
    seed: int = 0
    """Of the noise of a model. Not in the hash: others draw from other generators, and their images compare too."""
    version: int = 2
    """Goes up with every change that moves a number."""
    source: str = field(default="", compare=False)
    """Where it is from, and where we depart from it."""

    def measurement(self, metric: str) -> Measurement:
        """How a metric is taken under this protocol: its own way, or the default network on the image steps of its FID.

        Raises:
            UserError: for a metric that does not exist.
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
        if metric == "diversity":  # in the features of the toy world's FID, where that is it
            network = own["fid"].network if "fid" in own else networks[metric]
            return Measurement(metric, network if network.startswith("clip_image") else networks[metric])
        steps = own.get("fid", Measurement("fid", self.inception))
        return Measurement(metric, networks[metric], steps.steps, steps.reference_steps)


INCEPTION_METRICS = ("fid", "patch_fid", "kid", "precision_recall")
DEFAULT_NETWORKS = {
    "fd_dinov2": "dinov2:facebook/dinov2-large",
    "cmmd": "clip_unit:vit-l-14-336",
    "clip_score": "clip_text:vit-g-14-s12b",
    "diversity": "clip_image:vit-l-14",
    "pickscore": "pickscore:pickscore",
    "hpsv2": "hpsv2:hpsv2",
}
"""For metrics that a protocol does not name."""


def metric_hash(settings: Mapping[str, Any]) -> str:
    """12 hex digits over everything that a number depends on besides the images."""
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
    """What enters a number's hash; kept beside it, so that two results can say in what they differ.

    Args:
        protocol: the named one.
        measurement: of this number.
        identity: of the network: name, hash of its weights, preprocessing.
        samples: how many images there were.
        formats: `lossless`, or the endings of their files.
        captions: digest of the captions, where the metric reads them.
        reference: digest of the reference set, where there is one.
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
