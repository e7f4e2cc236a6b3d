"""Networks that images are judged by, frozen, in float32: the protocol of all of them, and a CLIP in a local folder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import open_clip
import torch
from torch import Tensor
from torch.nn import functional as F


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No gradients, no autocast, no TF32: what a number that is compared between machines is measured in.

    Under the bf16 autocast that Lightning wraps around steps, an Inception FID came out 3 % too high.
    """
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        if device.type != "cuda":
            yield
            return
        before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before[0])
            torch.backends.cudnn.allow_tf32 = before[1]


class Features(Protocol):
    """A network that turns images into the vectors that distances between sets of images are measured in.

    Always in eval mode, without gradients, in float32 also under autocast, and not an nn.Module: no checkpoint, optimizer or
    DDP bucket sees its weights. It follows the images to their device.
    """

    name: str
    """Short; stands in results."""
    dimensions: int
    """d."""

    def __call__(self, images_uint8: Tensor) -> Tensor:
        """(B,3,H,W) uint8 images to (B, d) float32 features."""

    def identity(self) -> dict[str, str]:
        """What the features depend on: hash of the weights, resize, normalisation. Enters the protocol's hash."""


@dataclass(frozen=True)
class CentreCrop:
    """Features of the middle of each image at its full resolution: what patch FID is measured in.

    Source: SDXL-Lightning, arXiv:2402.13929; DMD2's evaluator crops both sets to the 299 pixels of Inception.
    """

    features: Features
    """Of the crop."""
    px: int = 299
    """Side of the crop."""

    @property
    def name(self) -> str:
        """Of the network, and the crop."""
        return f"{self.features.name}-centre{self.px}"

    @property
    def dimensions(self) -> int:
        """As of the network."""
        return self.features.dimensions

    def __call__(self, images_uint8: Tensor) -> Tensor:
        """See Features.

        Raises:
            ValueError: for images smaller than the crop (other tools measure those uncropped, without a word).
        """
        height, width = images_uint8.shape[-2:]
        if min(height, width) < self.px:
            raise ValueError(
                f"patch FID crops {self.px} x {self.px} pixels out of each image, but these have {height} x {width}; "
                "use images at full resolution, or a protocol without patch FID"
            )
        top, left = (round((side - self.px) / 2) for side in (height, width))
        return self.features(images_uint8[..., top : top + self.px, left : left + self.px])

    def identity(self) -> dict[str, str]:
        """See Features."""
        return self.features.identity() | {"crop": f"centre {self.px}"}


class FrozenClip:
    """An open_clip model that only ever judges.

    Not an nn.Module: whatever holds it, its weights are in no checkpoint, no optimizer and no DDP bucket, and no `train()`
    of a parent reaches it. It follows the images to their device.

    Args:
        folder: open_clip's local layout: `open_clip_config.json`, weights in safetensors, tokenizer files.

    Raises:
        FileNotFoundError: if the folder or its configuration is missing.
    """

    def __init__(self, folder: str | Path) -> None:
        if not (Path(folder) / "open_clip_config.json").is_file():
            raise FileNotFoundError(
                f"no CLIP in open_clip layout at {folder} (open_clip_config.json is missing); set the protocol's `clip` "
                "to such a folder"
            )
        self.folder = Path(folder)
        self.name = f"clip-{self.folder.name}"
        model = open_clip.create_model(f"local-dir:{folder}", require_pretrained=True)
        self.model = model.float().eval().requires_grad_(False)
        self.tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
        self.eos_token_id = _eos_token_id(self.tokenizer)
        self.device = torch.device("cpu")
        preprocessing = model.visual.preprocess_cfg
        self._size = int(_first(preprocessing["size"]))
        self._mean = torch.tensor(preprocessing["mean"]).view(1, 3, 1, 1)
        self._std = torch.tensor(preprocessing["std"]).view(1, 3, 1, 1)
        with full_precision(self.device):
            probe = self.model.encode_image(torch.zeros(1, 3, self._size, self._size))
        self.dimensions = int(probe.shape[1])

    def to(self, device: torch.device) -> FrozenClip:
        """Move the weights, if they are not there already."""
        if device != self.device:
            self.model.to(device)
            self._mean, self._std = self._mean.to(device), self._std.to(device)
            self.device = device
        return self

    def preprocess(self, images_uint8: Tensor) -> Tensor:
        """What open_clip's evaluation transform does: shortest side to size (bicubic), centre crop, normalise.

        Images of the right size are only normalised. Otherwise torch's bicubic with antialias stands in for PIL's, in
        float, clamped and rounded: they differ by at most one grey level.

        Args:
            images_uint8: (B,3,H,W), uint8.

        Returns:
            (B,3,size,size), float32.

        Raises:
            TypeError: for images that are not uint8: floats in [0,1] would be divided by 255 once more.
        """
        if images_uint8.dtype != torch.uint8:
            raise TypeError(
                f"images to judge are uint8 in 0..255, got {images_uint8.dtype}; use latents.to_uint8"
            )
        images = images_uint8.float()
        if images.shape[-2:] != (self._size, self._size):
            images = _shortest_side_and_centre(images, self._size).clamp(0, 255).round()
        return (images / 255 - self._mean) / self._std

    def image_features(self, images_uint8: Tensor) -> Tensor:
        """(B,3,H,W) uint8 to (B, dimensions) float32, before normalisation to the unit sphere: FID's features."""
        self.to(images_uint8.device)
        with full_precision(self.device):
            features: Tensor = self.model.encode_image(self.preprocess(images_uint8))
        return features.float()

    __call__ = image_features

    def identity(self) -> dict[str, str]:
        """See Features."""
        return {
            "network": "open_clip image features before normalisation",
            "weights_sha256": hash_files(self.folder),
            "resize": "shortest side, bicubic, centre crop",
            "normalisation": "mean and deviation of the folder's preprocess_cfg",
        }

    def text_features(self, captions: Sequence[str]) -> Tensor:
        """B captions to (B, dimensions) float32, before normalisation."""
        with full_precision(self.device):
            features: Tensor = self.model.encode_text(self.tokenize(captions).to(self.device))
        return features.float()

    def cosine(self, images_uint8: Tensor, captions: Sequence[str]) -> Tensor:
        """Cosine of each image with its caption: (B,), float32."""
        image_features = self.image_features(images_uint8)
        return F.cosine_similarity(image_features, self.text_features(captions), dim=-1)

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        """(B, context length) int64 ids; a caption that is too long keeps its end-of-text token.

        The text vector is read at that token. A tokenizer that cuts it off makes every long caption read at its first
        token, so that all of them get the same vector (torchmetrics 1.9 does).
        """
        token_ids: Tensor = self.tokenizer(list(captions))
        unfinished = (token_ids != self.eos_token_id).all(dim=-1)
        token_ids[unfinished, -1] = self.eos_token_id
        return token_ids


def hash_files(path: str | Path) -> str:
    """16 hex digits over the weights: of a file, or of every .safetensors, .pt, .pth and .bin of a folder.

    Raises:
        FileNotFoundError: if there are none.
    """
    path = Path(path)
    suffixes = {".safetensors", ".pt", ".pth", ".bin"}
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.suffix in suffixes)
    if not files:
        raise FileNotFoundError(f"no weights at {path}; a file or a folder with .safetensors is needed")
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as content:
            while block := content.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()[:16]


def _eos_token_id(tokenizer: Any) -> int:
    """open_clip's own tokenizer names it differently from the transformers one that it wraps."""
    if hasattr(tokenizer, "eot_token_id"):
        return int(tokenizer.eot_token_id)
    return int(tokenizer.tokenizer.eos_token_id)


def _first(size: int | Sequence[int]) -> int:
    return size if isinstance(size, int) else size[0]


def _shortest_side_and_centre(images: Tensor, size: int) -> Tensor:
    """(B,C,H,W) float to (B,C,size,size), with torchvision's rounding of sizes and offsets."""
    height, width = images.shape[-2:]
    shortest = min(height, width)
    resized = F.interpolate(
        images, (size * height // shortest, size * width // shortest), mode="bicubic", antialias=True
    )
    top, left = (round((side - size) / 2) for side in resized.shape[-2:])
    return resized[..., top : top + size, left : left + size]
