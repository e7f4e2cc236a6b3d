"""LAION's aesthetic predictors: a head on the CLIP features of an image that predicts people's rating of it, 1 to 10."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import normalize

from evaluation.networks.clip_models import load_clip
from evaluation.networks.frozen_clip import FrozenClip
from evaluation.networks.network_features import full_precision, hash_state

CLIP = "vit-l-14"
HEAD_NAMES = ("aesthetic.safetensors", "aesthetic.pth")
"""File names of the head in a folder that also holds its CLIP."""
SOURCE = (
    "sac+logos+ava1-l14-linearMSE.pth of github.com/christophschuhmann/improved-aesthetic-predictor, or "
    "sa_0_4_vit_l_14_linear.pth of github.com/LAION-AI/aesthetic-predictor"
)


class AestheticPredictor:
    """A CLIP and a head of linear layers without activations, on features of length 1.

    Args:
        weights: the head's file (.safetensors, or .pth read with weights_only), whose CLIP is OpenAI's ViT-L/14; or a folder
            with a CLIP in open_clip's or transformers' layout and the head as one of HEAD_NAMES.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: for a file that holds no such head, or one for other features.

    Source: LAION's aesthetic predictor, versions 1 (one layer) and 2 (five).
    """

    def __init__(self, weights: str | Path | None) -> None:
        path = None if weights is None else Path(weights)
        head = next((path / name for name in HEAD_NAMES if (path / name).is_file()), None) if path else None
        file = head or path
        if file is None or not file.is_file():
            raise FileNotFoundError(
                f"aesthetic needs the file of its head, {weights or SOURCE}, as --weights aesthetic=FILE, or a folder with "
                f"its CLIP and {' or '.join(HEAD_NAMES)}"
            )
        assert path is not None
        self.clip: FrozenClip = load_clip(path if head else CLIP)
        self.head = read_head(file, self.clip.dimensions)
        self.name, self.dimensions = f"aesthetic-{self.clip.name}", 1

    def __call__(self, images_uint8: Tensor) -> Tensor:
        """(B,3,H,W) uint8 to (B,) float32 ratings."""
        features = normalize(self.clip.image_features(images_uint8))
        self.head.to(features.device)
        with full_precision(features.device):
            ratings: Tensor = self.head(features)[:, 0]
        return ratings

    def identity(self) -> dict[str, str]:
        return self.clip.identity() | {
            "network": "aesthetic head on CLIP image features of length 1",
            "head_sha256": hash_state(self.head),
        }


def read_head(file: Path, dimensions: int) -> nn.Sequential:
    """The linear layers of a file, in the order of their numbers.

    Raises:
        ValueError: unless they lead from `dimensions` features to one number.
    """
    safe = file.suffix == ".safetensors"
    state = load_file(file) if safe else torch.load(file, map_location="cpu", weights_only=True)
    weights = sorted((_number(name), name) for name in state if name.endswith("weight"))
    layers, width = [], dimensions
    for _, name in weights:
        weight, bias = state[name], state.get(f"{name.removesuffix('weight')}bias")
        if weight.ndim != 2 or weight.shape[1] != width or bias is None:
            break
        layer = nn.Linear(width, len(weight))
        layer.load_state_dict({"weight": weight, "bias": bias})
        layers.append(layer)
        width = len(weight)
    if not layers or len(layers) < len(weights) or width != 1:
        raise ValueError(
            f"'{file}' holds no head of linear layers from {dimensions} features to one number; take {SOURCE}"
        )
    return nn.Sequential(*layers).eval().requires_grad_(False)


def _number(name: str) -> int:
    numbers = re.findall(r"\d+", name)
    return int(numbers[-1]) if numbers else 0
