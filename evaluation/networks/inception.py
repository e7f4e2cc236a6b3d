"""Features of FID's Inception network, with the resizing of the common FID tools."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from evaluation.networks.inception_network import Inception
from evaluation.networks.network_features import check_uint8, full_precision, hash_state
from evaluation.networks.resize import resize_bilinear_tf1, resize_float

InceptionResize = Literal["clean", "torch-fidelity", "torchmetrics", "pytorch-fid"]
"""Tool whose resize to 299 x 299 pixels is used; FID of the same images differs by 30 % between them."""

WEIGHT_FILES = ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth")
"""File names of torch-fidelity and pytorch-fid; the weights are equal."""

WEIGHTS_URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/" + WEIGHT_FILES[0]

PX = 299


class InceptionFeatures:
    """Inception features of FID, KID, precision and recall; implements `evaluation.networks.network_features.Features`.

    Args:
        weights: file in torch-fidelity's or pytorch-fid's layout; None searches torch's hub cache for either.
        resize: tool whose resize and normalisation are used.

    Raises:
        FileNotFoundError: if the weights are missing; nothing is downloaded.
        ValueError: for an unknown resize, or weights of another network.
    """

    dimensions = 2048

    def __init__(self, weights: str | Path | None = None, resize: InceptionResize = "clean") -> None:
        if resize not in get_args(InceptionResize):
            raise ValueError(
                f"resize of Inception is one of {', '.join(get_args(InceptionResize))}, got {resize!r}"
            )
        self.resize: InceptionResize = resize
        self.name = f"inception-{resize}"
        self.weights = find_weights(weights)
        with torch.device("meta"):  # skips random initialisation
            self.network = Inception()
        state: dict[str, Any] = torch.load(self.weights, map_location="cpu", weights_only=True)
        try:
            self.network.load_state_dict(state, assign=True)
        except RuntimeError as error:
            raise ValueError(
                f"{self.weights} holds no FID Inception ({str(error).splitlines()[-1].strip()[:120]}); use {WEIGHTS_URL}"
            ) from error
        self.network.eval().requires_grad_(False)
        self.device = torch.device("cpu")

    def __call__(self, images_uint8: Tensor) -> Tensor:
        """Compute features.

        Raises:
            TypeError: for images that are not uint8.
        """
        self.to(images_uint8.device)
        with full_precision(self.device):
            features: Tensor = self.network(self.pixels(images_uint8))
        return features

    def to(self, device: torch.device) -> InceptionFeatures:
        """Move the weights to a device, if needed."""
        if device != self.device:
            self.network.to(device)
            self.device = device
        return self

    def pixels(self, images_uint8: Tensor) -> Tensor:
        """(B,3,H,W) uint8 to (B,3,299,299) float32, resized and normalised as in the chosen tool."""
        check_uint8(images_uint8)
        if self.resize == "clean":
            return (resize_float(images_uint8, (PX, PX), "bicubic").clamp(0, 255) - 128) / 128
        if self.resize == "torch-fidelity":
            return (resize_bilinear_tf1(images_uint8.float(), (PX, PX)) - 128) / 128
        if self.resize == "torchmetrics":
            images = images_uint8.float()
            return (F.interpolate(images, (PX, PX), mode="bilinear", antialias=True) - 128) / 128
        return 2 * F.interpolate(images_uint8.float() / 255, (PX, PX), mode="bilinear") - 1

    def identity(self) -> dict[str, str]:
        return {
            "network": "FID Inception 2015-12-05, 2048 averages before the classifier",
            "weights_sha256": hash_state(self.network),
            "resize": {
                "clean": "bicubic with antialias in float, clamped, not rounded (clean-fid)",
                "torch-fidelity": "bilinear of TensorFlow 1 (torch-fidelity)",
                "torchmetrics": "bilinear with antialias (torchmetrics' default)",
                "pytorch-fid": "bilinear without antialias (pytorch-fid)",
            }[self.resize],
            "normalisation": "2x / 255 - 1" if self.resize == "pytorch-fid" else "(x - 128) / 128",
        }


class InceptionLogits(InceptionFeatures):
    """Logits of the FID Inception's 1008 classes without bias, for the Inception score; arguments as InceptionFeatures."""

    dimensions = 1008

    def __call__(self, images_uint8: Tensor) -> Tensor:
        features = super().__call__(images_uint8)
        with full_precision(self.device):
            return self.network.logits(features)

    def identity(self) -> dict[str, str]:
        return super().identity() | {"network": "FID Inception 2015-12-05, 1008 logits without bias"}


def find_weights(weights: str | Path | None = None) -> Path:
    """The given file, or one of WEIGHT_FILES in torch's hub cache.

    Raises:
        FileNotFoundError: if there is none.
    """
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    candidates = [Path(weights)] if weights is not None else [cache / name for name in WEIGHT_FILES]
    for file in candidates:
        if file.is_file():
            return file
    missing = weights if weights is not None else " or ".join(WEIGHT_FILES) + f" in {cache}"
    raise FileNotFoundError(
        f"no Inception weights: {missing} is missing; download {WEIGHTS_URL} (95 MB) into {cache}, or name the file by "
        "`weights`"
    )
