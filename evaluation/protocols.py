"""Named ways of measuring. A number says under which one it was obtained; numbers of different ones are not compared."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from data.toy.world import Split, captions

REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Protocol:
    """What is generated, against what it is compared, and by whom it is judged.

    Always so: noise of sample i is seeded by (seed, i), images are clamped and rounded to uint8 in memory, features are
    float32 without autocast, sums float64, covariance over n - 1.
    """

    name: str
    """Stands in every result."""
    split: Split
    """The toy world's split that gives the prompts (its first `samples`) and the reference images."""
    samples: int
    """How many images are generated. FID falls with it, so it belongs to the protocol."""
    reference_samples: int
    """How many real images of the split the reference statistics are made of."""
    reference: str
    """npz of their statistics."""
    fresh_split: Split
    """Its first `samples` real images are not among the reference's: real against real, and the autoencoder's floor."""
    clip: str = "data/toy/clip"
    """open_clip folder: FID on its image features before normalisation, and CLIP score."""
    classifier: str = "data/toy/classifier"
    """Folder of the attribute classifier: caption accuracy."""
    seed: int = 0
    """Of the noise."""

    def path(self, relative: str) -> Path:
        """A path of this protocol; relative ones start at the repository, from wherever a command runs."""
        return REPOSITORY / relative

    def captions(self) -> list[str]:
        """The prompts."""
        return captions(self.split, self.samples)

    def reference_origin(self) -> dict[str, Any]:
        """What the reference statistics depend on; stored in their npz and compared on reading."""
        return {
            "world": "toy",
            "split": self.split,
            "samples": self.reference_samples,
            "captions_sha256": _digest("\n".join(captions(self.split, 256)).encode()),
            "clip_sha256": hash_weights(self.path(self.clip)),
            "features": "open_clip image features before normalisation, float32",
        }

    def fingerprint(self) -> str:
        """12 hex digits that change with anything that changes the numbers: settings, prompts, the judges' weights."""
        settings = {
            key: value
            for key, value in asdict(self).items()
            if key not in ("reference", "clip", "classifier")
        }
        settings |= {
            "reference_origin": self.reference_origin(),
            "classifier_sha256": hash_weights(self.path(self.classifier)),
            "version": 1,
        }
        return _digest(json.dumps(settings, sort_keys=True).encode())[:12]

    def describe(self) -> dict[str, Any]:
        """For a result file: the settings and the fingerprint."""
        return {**asdict(self), "fingerprint": self.fingerprint()}


PROTOCOLS = {
    "toy": Protocol("toy", "test", 1000, 6000, "data/toy/reference.npz", "val"),
    "toy-val": Protocol("toy-val", "val", 500, 6000, "data/toy/reference_val.npz", "train"),
}
"""`toy`: the held-out figures of reports. `toy-val`: the curves of a training, and what settings may be chosen by."""


def get_protocol(name: str, **changes: Any) -> Protocol:
    """A protocol by name; `changes` (those that are not None) make another one, with another fingerprint.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in PROTOCOLS:
        raise ValueError(
            f"no protocol named {name!r}; there are {', '.join(PROTOCOLS)} (evaluation/protocols.py)"
        )
    return replace(PROTOCOLS[name], **{key: value for key, value in changes.items() if value is not None})


def hash_weights(folder: str | Path) -> str:
    """16 hex digits over the safetensors files of a folder, and over where they lie in it.

    Raises:
        FileNotFoundError: if it holds none.
    """
    files = sorted(Path(folder).rglob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no .safetensors under {folder}")
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.relative_to(folder).as_posix().encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
