"""A frozen CLIP: features of images for FID, cosines with captions for CLIP score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from evaluation.networks.clip_loading import LoadedClip, load_folder
from evaluation.networks.network_features import check_uint8, full_precision, hash_state
from evaluation.networks.resize import centre_square, resize_shortest_and_crop, resize_uint8


@dataclass(frozen=True)
class ClipRule:
    """Preprocessing of captions and images, applied before the CLIP model's own."""

    prefix: str = ""
    """Prepended to every caption as tokens after the start token; the row is then truncated."""
    square_px: int | None = None
    """Size to which images are cropped and resized (Lanczos, 8 bit) first."""


PLAIN = ClipRule()
"""No extra preprocessing, as in open_clip's examples."""


class FrozenClip:
    """A CLIP model that is never trained.

    Not an nn.Module, so its weights enter no checkpoint, optimizer or DDP bucket, and a parent's `train()` does not affect it.
    It moves to the device of the images.

    Args:
        source: a folder in open_clip's layout (`open_clip_config.json`, weights in safetensors, tokenizer files) or in that
            of transformers, or a LoadedClip. `clip_models.load_clip` has presets of published models.
        rule: preprocessing of captions and images.

    Raises:
        FileNotFoundError: if the folder or its configuration is missing.
    """

    def __init__(self, source: str | Path | LoadedClip, rule: ClipRule = PLAIN) -> None:
        loaded = source if isinstance(source, LoadedClip) else load_folder(source)
        self.name, self.rule = loaded.name, rule
        self.model = loaded.model.eval().requires_grad_(False)
        self.tokenizer, self.eos_token_id = loaded.tokenizer, loaded.eos_token_id
        self.device = torch.device("cpu")
        self.size = loaded.size
        self._image_settings, self._text_settings = loaded.image_settings, loaded.text_settings
        self._encode_image, self._encode_text = loaded.encode_image, loaded.encode_text
        self._mean = torch.tensor(loaded.mean).view(1, 3, 1, 1)
        self._std = torch.tensor(loaded.std).view(1, 3, 1, 1)
        self.dimensions = int(self.features_of(torch.zeros(1, 3, self.size, self.size)).shape[1])

    def to(self, device: torch.device) -> FrozenClip:
        """Move the weights to a device, if needed."""
        if device != self.device:
            self.model.to(device)
            self._mean, self._std = self._mean.to(device), self._std.to(device)
            self.device = device
        return self

    def preprocess(self, images_uint8: Tensor) -> Tensor:
        """Open_clip's evaluation transform for Pillow images: resize the shortest side, centre crop, normalise.

        Bit-exact on any device; images of the right size are only normalised.

        Args:
            images_uint8: (B,3,H,W), uint8.

        Returns:
            (B,3,size,size), float32.

        Raises:
            TypeError: for images that are not uint8: floats in [0, 1] would be divided by 255 again.
        """
        check_uint8(images_uint8)
        if self.rule.square_px is not None:
            px = self.rule.square_px
            images_uint8 = resize_uint8(centre_square(images_uint8), (px, px), "lanczos")
        return self.normalise(resize_shortest_and_crop(images_uint8, self.size).float())

    def normalise(self, images: Tensor) -> Tensor:
        """Normalise float images in [0, 255] for the model."""
        return (images / 255 - self._mean) / self._std

    def features_of(self, pixels: Tensor) -> Tensor:
        """(B,3,size,size) normalised pixels to (B, dimensions) float32."""
        with full_precision(self.device):
            features = self._encode_image(pixels)
        return features.float()

    def image_features(self, images_uint8: Tensor) -> Tensor:
        """(B,3,H,W) uint8 to (B, dimensions) float32, before L2 normalisation; the features of FID."""
        self.to(images_uint8.device)
        return self.features_of(self.preprocess(images_uint8))

    __call__ = image_features

    def identity(self) -> dict[str, str]:
        square = f"centre square to {self.rule.square_px} by Lanczos, then " if self.rule.square_px else ""
        return {
            "network": "CLIP image features before normalisation to length 1",
            "weights_sha256": hash_state(self.model),
            "architecture_sha256": self._image_settings,
            "resize": f"{square}shortest side to {self.size}, bicubic, 8 bits (Pillow), centre crop",
            "normalisation": f"mean {self._mean.flatten().tolist()}, deviation {self._std.flatten().tolist()}",
            "caption_prefix": self.rule.prefix,
        }

    def text_identity(self) -> dict[str, str]:
        """Additional identity of the text features: hash of the tokenizer and of the text tower's configuration."""
        return {"text_sha256": self._text_settings}

    def text_features(self, captions: Sequence[str]) -> Tensor:
        """B captions to (B, dimensions) float32, before L2 normalisation."""
        with full_precision(self.device):
            features = self._encode_text(self.tokenize(captions).to(self.device))
        return features.float()

    def cosine(self, images_uint8: Tensor, captions: Sequence[str]) -> Tensor:
        """Cosine of each image with its caption: (B,), float32."""
        image_features = self.image_features(images_uint8)
        return F.cosine_similarity(image_features, self.text_features(captions), dim=-1)

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        """(B, context length) int64 ids; a truncated caption keeps its end-of-text token.

        The text embedding is read at that token. If it is cut off (as in torchmetrics 1.9), the embedding is read at the
        first token and is the same for all long captions.
        """
        token_ids = self.tokenizer(list(captions))
        unfinished = (token_ids != self.eos_token_id).all(dim=-1)
        token_ids[unfinished, -1] = self.eos_token_id
        return self._with_prefix(token_ids) if self.rule.prefix else token_ids

    def _with_prefix(self, token_ids: Tensor) -> Tensor:
        """Insert the prefix's tokens after the start token; in a full row, the last token becomes the end token.

        Source: DMD2's evaluator, token for token (padding is 0, and a 0 in the last column stays).
        """
        prefix = self.tokenizer([self.rule.prefix])[0]
        length = int((prefix == self.eos_token_id).nonzero()[0, 0]) - 1
        inserted = prefix[1 : 1 + length].expand(len(token_ids), -1)
        token_ids = torch.cat([token_ids[:, :1], inserted, token_ids[:, 1:]], dim=1)[:, : token_ids.shape[1]]
        full = token_ids[:, -1] > 0
        token_ids[full, -1] = self.eos_token_id
        return token_ids
