"""Features of vision transformers: DINOv2 for FD-DINOv2, CLIP image features for CMMD."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from evaluation.networks.clip_loading import architecture_hash, check_source
from evaluation.networks.frozen_clip import FrozenClip
from evaluation.networks.network_features import check_uint8, full_precision, hash_state
from evaluation.networks.resize import resize_float, resize_uint8
from sdxs_lightning.core.errors import first_line
from sdxs_lightning.families.quiet import quiet_libraries

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class DinoV2Features:
    """Class token of DINOv2 after the final norm, for FD-DINOv2; implements `network_features.Features`.

    Args:
        model: folder or hub id of a Dinov2Model of transformers ("facebook/dinov2-large" is the paper's).
        px: side length to which images are resized, ignoring the aspect ratio.

    Raises:
        FileNotFoundError: if the model cannot be loaded.
        ValueError: for a folder with pickled weights or with code.

    Source: Stein et al., arXiv:2306.04675; bicubic resize of 8-bit images as in their dgm-eval.
    """

    def __init__(self, model: str | Path, px: int = 224) -> None:
        from transformers import Dinov2Model

        check_source(model, "DINOv2")
        quiet_libraries()
        try:
            network = Dinov2Model.from_pretrained(
                str(model), dtype=torch.float32, use_safetensors=True, local_files_only=Path(model).is_dir()
            )
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"no DINOv2 of transformers at {model} ({first_line(error)[:200]}); give a folder with "
                "config.json and model.safetensors, or a hub id such as facebook/dinov2-large"
            ) from error
        self.network = network.eval().requires_grad_(False)
        self.px, self.name = px, f"dinov2-{Path(model).name}"
        self.dimensions = int(network.config.hidden_size)
        self.device = torch.device("cpu")
        self._mean, self._std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))

    def __call__(self, images_uint8: Tensor) -> Tensor:
        check_uint8(images_uint8)
        device = self.to(images_uint8.device).device
        pixels = resize_uint8(images_uint8, (self.px, self.px), "bicubic").float() / 255
        with full_precision(device):
            output = self.network((pixels - self._mean.to(device)) / self._std.to(device))
        features: Tensor = output.last_hidden_state[:, 0]
        return features

    def to(self, device: torch.device) -> DinoV2Features:
        """Move the weights to a device, if needed."""
        if device != self.device:
            self.network.to(device)
            self.device = device
        return self

    def identity(self) -> dict[str, str]:
        return {
            "network": "DINOv2 (transformers), class token after the last norm",
            "weights_sha256": hash_state(self.network),
            "architecture_sha256": architecture_hash(self.network.config),
            "resize": f"{self.px} x {self.px}, bicubic, 8 bits (Pillow)",
            "normalisation": "ImageNet's mean and deviation",
        }


class ClipImageFeatures:
    """L2-normalised CLIP image features of images resized without keeping the aspect ratio, for CMMD.

    Args:
        clip: the model; the paper uses ViT-L/14 at 336 pixels (`load_clip("vit-l-14-336")`).

    Source: Jayasumana et al., arXiv:2401.09603: bicubic with antialias in float, neither clamped nor rounded.
    """

    def __init__(self, clip: FrozenClip) -> None:
        self.clip = clip
        self.name = f"{clip.name}-unit"
        self.dimensions = clip.dimensions

    def __call__(self, images_uint8: Tensor) -> Tensor:
        check_uint8(images_uint8)
        clip = self.clip.to(images_uint8.device)
        pixels = resize_float(images_uint8, (clip.size, clip.size), "bicubic")
        return normalize(clip.features_of(clip.normalise(pixels)))

    def identity(self) -> dict[str, str]:
        return self.clip.identity() | {
            "network": "CLIP image features of length 1",
            "resize": "squashed, bicubic with antialias in float, not rounded",
        }
