"""Builds metrics and loads their networks from the names in a protocol."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from data.toy.training.classifier import AttributeClassifier
from evaluation.metrics.caption_accuracy import CaptionAccuracy
from evaluation.metrics.clip_score import AestheticScore, ClipScore, PreferenceScore
from evaluation.metrics.diversity import PromptDiversity
from evaluation.metrics.feature_sets import FeatureSetMetric
from evaluation.metrics.frechet import FrechetDistance
from evaluation.metrics.inception_score import InceptionScore
from evaluation.metrics.kernel_distance import KernelDistance, MaximumMeanDiscrepancy
from evaluation.metrics.precision_recall import PrecisionRecall
from evaluation.metrics.sampled import SampledMetric
from evaluation.metrics.shape_score import ShapeScore, ToyRenderer
from evaluation.networks.aesthetic import AestheticPredictor
from evaluation.networks.clip_models import load_clip
from evaluation.networks.frozen_clip import FrozenClip
from evaluation.networks.inception import InceptionFeatures, InceptionLogits
from evaluation.networks.vit_features import ClipImageFeatures, DinoV2Features
from evaluation.protocols.image_protocol import Measurement
from evaluation.protocols.names import CAPTION_METRICS, FRECHET_METRICS
from evaluation.protocols.protocols import REPOSITORY
from evaluation.protocols.references import Reference
from sdxs_lightning.core.errors import UserError
from sdxs_lightning.core.model_hash import files_below, hash_weights

FEATURE_SETS: dict[str, Callable[..., SampledMetric]] = {
    "kid": KernelDistance,
    "precision_recall": PrecisionRecall,
    "cmmd": MaximumMeanDiscrepancy,
}
"""Metrics that need the features of the reference set rather than their statistics."""
IMAGES_PER_PROMPT = 8
"""Images per prompt for diversity."""


@dataclass
class NetworkCache:
    """Loads each metric network once.

    Networks are named KIND:NAME, where KIND is `inception`, `inception_logits`, `dinov2`, `clip_image` (unnormalised features),
    `clip_unit` (L2-normalised features of images resized without keeping the aspect ratio), `clip_text`, `pickscore`, `hpsv2`,
    `aesthetic`, `attributes` or `renderer`.
    """

    weights: Mapping[str, str] = field(default_factory=dict)
    """File or folder of the weights by KIND, in place of the default location."""
    _loaded: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = sorted(set(self.weights) - set(_LOADERS))
        if unknown:
            raise UserError(f"--weights names {', '.join(unknown)}, but takes {', '.join(_LOADERS)}.")

    def network(self, name: str) -> Any:
        """The network of a name.

        Raises:
            UserError: if its weights are missing.
        """
        kind, _, which = name.partition(":")
        path = self.weights.get(kind)
        key = f"{_LOADERS[kind].__name__}:{which}:{path}"  # FID and CLIP score share a CLIP network
        if key not in self._loaded:
            try:
                self._loaded[key] = _LOADERS[kind](which, path)
            except (OSError, ValueError, RuntimeError) as error:
                raise UserError(f"{name}: {error}") from error
        return self._loaded[key]

    def metric(self, measurement: Measurement, reference: Reference | None = None) -> SampledMetric:
        """Build a metric.

        Args:
            measurement: the metric.
            reference: the real side; without it, a reference metric can only `measure`.
        """
        name, network = measurement.metric, self.network(measurement.network)
        if name in FRECHET_METRICS:
            statistics = None if reference is None else reference.as_statistics()
            return FrechetDistance(network, reference=statistics, name=name)
        if name in FEATURE_SETS:
            return FEATURE_SETS[name](network, None if reference is None else reference.rows)
        if name == "aesthetic":
            return AestheticScore(network)
        if name == "inception_score":
            return InceptionScore(network)
        if name == "diversity":
            return PromptDiversity(network, IMAGES_PER_PROMPT)
        if name == "clip_score":
            return ClipScore(network)
        if name == "caption_accuracy":
            return CaptionAccuracy(network)
        if name == "shape_score":
            return ShapeScore()
        return PreferenceScore(network, scale=1.0 if name == "hpsv2" else None, name=name)

    def require_fit(
        self,
        measurement: Measurement,
        samples: int,
        real: int,
        reference: Reference | None = None,
        where: str = "the reference",
    ) -> None:
        """Check the number of images and the reference's dimensions before measuring.

        Args:
            measurement: a metric with a reference.
            samples: number of generated images.
            real: number of reference images; 0 if unknown.
            reference: the real side, if loaded.
            where: name of the reference in messages.

        Raises:
            UserError: for too few images, or features of different dimensions.
        """
        if reference is not None:
            dimensions = getattr(self.network(measurement.network), "dimensions", None)
            reference.require_dimensions(dimensions, measurement.metric, where)
        metric = self.metric(measurement)
        least = metric.least if isinstance(metric, FeatureSetMetric) else 2
        if samples < least or 0 < real < least:
            raise UserError(
                f"{measurement.metric} needs at least {least} images on each side, got {samples}"
                f"{f' and {real} of the reference' if real else ''}; leave it out, or give more images."
            )

    def identity(self, measurement: Measurement) -> dict[str, str]:
        """Identity of a measurement's network, for hashes."""
        network = self.network(measurement.network)
        if isinstance(network, AttributeClassifier):
            folder = _place(measurement.network.partition(":")[2], self.weights.get("attributes"))
            return {"network": "attribute classifier", "weights_sha256": hash_weights(folder)}
        identity: dict[str, str] = network.identity()
        return identity | network.text_identity() if measurement.metric in CAPTION_METRICS else identity

    def all(self) -> list[Any]:
        """Loaded networks; each has `to`."""
        return [getattr(network, "clip", network) for network in self._loaded.values()]


def shared_networks(weights: tuple[tuple[str, str], ...]) -> NetworkCache:
    """The networks of this process, so that checks and measurements load them once.

    Files that changed since are loaded again.
    """
    return _shared(weights, tuple(_stamp(Path(path)) for _, path in weights))


@lru_cache(maxsize=1)
def _shared(weights: tuple[tuple[str, str], ...], stamps: tuple[object, ...]) -> NetworkCache:
    return NetworkCache(dict(weights))


def _stamp(path: Path) -> tuple[tuple[str, int, int], ...]:
    """Names, modification times and sizes of a file or of the files in a folder."""
    files = sorted(files_below(path)) if path.is_dir() else [path]
    return tuple(
        (str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files if file.is_file()
    )


def _inception(name: str, path: str | None) -> InceptionFeatures:
    return InceptionFeatures(path, name)  # type: ignore[arg-type]


def _inception_logits(name: str, path: str | None) -> InceptionLogits:
    return InceptionLogits(path, name)  # type: ignore[arg-type]


def _clip(name: str, path: str | None) -> FrozenClip:
    """Load a preset, a folder of the repository, or the folder or file given in place of a preset."""
    return load_clip(REPOSITORY / name) if (REPOSITORY / name).is_dir() else load_clip(name, path)


def _clip_unit(name: str, path: str | None) -> ClipImageFeatures:
    return ClipImageFeatures(_clip(name, path))


def _dinov2(name: str, path: str | None) -> DinoV2Features:
    return DinoV2Features(path or name)


def _aesthetic(name: str, path: str | None) -> AestheticPredictor:
    return AestheticPredictor(path)


def _attributes(name: str, path: str | None) -> AttributeClassifier:
    return AttributeClassifier.from_pretrained(_place(name, path))


def _renderer(name: str, path: str | None) -> ToyRenderer:
    return ToyRenderer()


def _place(name: str, path: str | None) -> Path:
    """Resolve a path: a protocol's relative to the repository, a user's relative to the working directory."""
    return Path(path) if path is not None else REPOSITORY / name


_LOADERS: dict[str, Callable[[str, str | None], Any]] = {
    "inception": _inception,
    "inception_logits": _inception_logits,
    "clip_image": _clip,
    "clip_text": _clip,
    "clip_unit": _clip_unit,
    "dinov2": _dinov2,
    "pickscore": _clip,
    "hpsv2": _clip,
    "aesthetic": _aesthetic,
    "attributes": _attributes,
    "renderer": _renderer,
}
