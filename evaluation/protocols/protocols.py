"""Named evaluation protocols. Each result states its protocol; results of different protocols are not comparable."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from data.toy.world import Split, captions
from evaluation.protocols.image_protocol import ImageProtocol, Measurement
from sdxs_lightning.core.model_hash import hash_weights

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Protocol:
    """A protocol of the toy world: prompts, reference images and metric networks.

    Common to all: noise of sample i is seeded by (seed, i), images are clamped and rounded to uint8 in memory, features are
    float32 without autocast, sums float64, covariance over n - 1.
    """

    name: str
    """Name of the protocol."""
    split: Split
    """Split of the toy world with the prompts (the first `samples`) and the reference images."""
    samples: int
    """Number of generated images; part of the protocol because FID decreases with it."""
    reference_samples: int
    """Number of real images in the reference statistics."""
    reference: str
    """npz of the reference statistics."""
    fresh_split: Split
    """Split disjoint from the reference; its first `samples` images give the scores of real and of reconstructed images."""
    clip: str = "data/toy/clip"
    """open_clip folder for FID (image features before normalisation) and CLIP score."""
    classifier: str = "data/toy/classifier"
    """Folder of the attribute classifier for caption accuracy."""
    seed: int = 0
    """Seed of the noise."""

    def path(self, relative: str) -> Path:
        """Resolve a path of this protocol relative to the repository."""
        return REPOSITORY / relative

    def captions(self) -> list[str]:
        return captions(self.split, self.samples)

    def reference_origin(self) -> dict[str, Any]:
        """Settings that the reference statistics depend on; stored in their npz and compared on reading."""
        return {
            "world": "toy",
            "split": self.split,
            "samples": self.reference_samples,
            "captions_sha256": _digest("\n".join(captions(self.split, 256)).encode()),
            "clip_sha256": hash_weights(self.path(self.clip)),
            "features": "open_clip image features before normalisation, float32",
        }

    def fingerprint(self) -> str:
        """12-digit hex hash of everything that affects the results: settings, prompts, network weights."""
        settings = {
            key: value
            for key, value in asdict(self).items()
            if key not in ("reference", "clip", "classifier")
        }
        settings |= {
            "reference_origin": self.reference_origin(),
            "classifier_sha256": hash_weights(self.path(self.classifier)),
            "version": 2,  # 2: with the shape score
        }
        return _digest(json.dumps(settings, sort_keys=True).encode())[:12]

    def describe(self) -> dict[str, Any]:
        """Settings and fingerprint, for result files."""
        return {**asdict(self), "fingerprint": self.fingerprint()}


PROTOCOLS = {
    "toy": Protocol("toy", "test", 1000, 6000, "data/toy/reference.npz", "val"),
    "toy-val": Protocol("toy-val", "val", 500, 6000, "data/toy/reference_val.npz", "train"),
}
"""`toy`: held-out results in reports. `toy-val`: training curves and tuning of settings."""

_CLEAN = "inception:clean"
_DMD2_SD, _DMD2_SDXL = ("crop", "resize 256 lanczos"), ("crop", "resize 512 lanczos")
_DMD2_CLIP = Measurement("clip_score", "clip_text:dmd2", _DMD2_SD)
_BK_SDM = ("resize 256 bicubic", "jpeg 75")

IMAGE_PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        ImageProtocol(
            "coco2017-5k",
            (
                Measurement("fid", _CLEAN, ("crop",), ("crop",)),
                Measurement("clip_score", "clip_text:vit-g-14-s12b"),
            ),
            samples=5000,
            lossless=True,
            source="SDXS, arXiv:2403.16627, table 3, whose FID tool, crop and CLIP are not stated: here clean-fid's resize of "
            "centred squares and OpenCLIP ViT-g-14; prompts: one caption of each val2017 image; reference: val2017",
        ),
        ImageProtocol(
            "coco2014-30k-256",
            (Measurement("fid", _CLEAN, _DMD2_SD, _DMD2_SD), _DMD2_CLIP),
            samples=30_000,
            image_px=512,
            lossless=True,
            source="DMD2, arXiv:2405.14867, SD-1.5: main/coco_eval/coco_evaluator.py; reference: all of val2014. Bytes are "
            "rounded here and truncated there, and noise is seeded by sample rather than by batch",
        ),
        ImageProtocol(
            "coco2014-10k-512",
            (
                Measurement("fid", _CLEAN, _DMD2_SDXL, _DMD2_SDXL),
                Measurement("patch_fid", _CLEAN, ("crop 299",), ("crop 299",)),
                _DMD2_CLIP,
            ),
            samples=10_000,
            image_px=1024,
            lossless=True,
            source="DMD2, arXiv:2405.14867, SDXL: FID at 512 px, patch FID on 299 px of the full image, CLIP score at 256 px; "
            "departures as in coco2014-30k-256",
        ),
        ImageProtocol(
            "bk-sdm",
            (
                Measurement("fid", "inception:pytorch-fid", ("jpeg 75", *_BK_SDM), _BK_SDM),
                Measurement("inception_score", "inception_logits:torch-fidelity", ("jpeg 75", *_BK_SDM)),
                Measurement("clip_score", "clip_text:bk-sdm", ("jpeg 75", *_BK_SDM)),
            ),
            samples=30_000,
            image_px=512,
            inception="inception:pytorch-fid",
            source="BK-SDM, arXiv:2305.15798: src/generate.py, src/utils/misc.py, src/eval_clip_score.py, "
            "scripts/eval_scores.sh (Inception score of torch-fidelity, FID of pytorch-fid); reference: all of val2014, "
            "squashed. Its CLIP score is on the scale 0 to 1, ours 0 to 100",
        ),
        *(
            ImageProtocol(
                name, (Measurement("fid", f"inception:{name}"),), inception=f"inception:{name}", source=source
            )
            for name, source in (
                ("clean", "clean-fid 0.1.35, mode clean, on files as they are"),
                ("torch-fidelity", "torch-fidelity 0.4, inception-v3-compat, 2048 features"),
                ("pytorch-fid", "pytorch-fid 0.3.0, 2048 features"),
                ("torchmetrics", "torchmetrics 1.9 with its default resize (bilinear with antialias)"),
            )
        ),
    )
}
"""Protocols of papers and of other tools."""

NAMES = (*PROTOCOLS, *IMAGE_PROTOCOLS)


def find_protocol(name: str) -> Protocol | ImageProtocol:
    """Find a protocol of either kind by name.

    Raises:
        ValueError: for an unknown name.
    """
    return IMAGE_PROTOCOLS[name] if name in IMAGE_PROTOCOLS else get_protocol(name)


def get_protocol(name: str, **changes: Any) -> Protocol:
    """A toy protocol by name; `changes` that are not None replace its fields and change its fingerprint.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in PROTOCOLS:
        raise ValueError(
            f"no protocol named {name!r}; there are {', '.join(NAMES)} (evaluation/protocols.py)"
        )
    return replace(PROTOCOLS[name], **{key: value for key, value in changes.items() if value is not None})


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
