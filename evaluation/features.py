"""The judge that FID and CLIP score share: an open_clip model in a local folder, frozen, in float32."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
