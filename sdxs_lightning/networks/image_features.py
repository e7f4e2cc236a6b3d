"""Frozen image networks that provide features for projected discriminators and feature matching.

A config names a *source*, which is cheap to construct and reads files only in `load`. The loaded network maps images in
[-1, 1] to feature maps and passes gradients on to the images. A network that a metric uses should not also train the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdxs_lightning.families.foreign import check_open_clip, check_transformers, without_hub
from sdxs_lightning.families.quiet import quiet_libraries

FeatureShape = tuple[int, int, int]
"""(C, h, w) of one sample's feature map."""


_OTHER_SOURCES = {
    "cache_dir",
    "checkpoint_path",
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "pretrained_strict",
}
"""Arguments of timm.create_model that say where weights come from."""


@runtime_checkable
class ImageFeatures(Protocol):
    """Source of a feature network, as named by `features.class_path`."""

    def load(self) -> FeatureNetwork:
        """Loads the network, float32, on the CPU (or on the device of a `torch.device` context)."""


class FeatureNetwork(nn.Module):
    """Maps images in [-1, 1] to a list of feature maps.

    Args:
        backbone: maps normalised images (B, 3, H, W) to feature maps.
        mean: (3,), mean of the normalisation of images in [0, 1].
        std: (3,), its standard deviation.
        size_px: side that images are resized to; None does not resize.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, backbone: nn.Module, mean: Sequence[float], std: Sequence[float], size_px: int | None
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.size_px = size_px
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Extracts feature maps.

        Args:
            images: (B, 3, H, W), float, in [-1, 1].

        Returns:
            One (B, C, h, w) per tapped layer, in the network's dtype.
        """
        if self.size_px is not None and images.shape[-2:] != (self.size_px, self.size_px):
            # Antialiased, so that a discriminator does not penalise aliasing artefacts.
            images = F.interpolate(
                images.float(), (self.size_px, self.size_px), mode="bilinear", antialias=True
            )
        normalised = ((images.float() + 1) / 2 - self.mean.float()) / self.std.float()
        features: list[Tensor] = self.backbone(normalised.to(self.mean.dtype))
        return features

    @torch.no_grad()
    def shapes(self, image_px: int) -> list[FeatureShape]:
        """Shape of each feature map for square images of side `image_px`."""
        probe = torch.zeros(1, 3, image_px, image_px, device=self.mean.device)
        return [cast(FeatureShape, tuple(features.shape[1:])) for features in self(probe)]


class TimmFeatures:
    """A timm model with weights from a local file: DINO and DINOv2 ViTs, or any network with `forward_intermediates`.

    Args:
        name: timm's model name, for example "vit_small_patch14_dinov2.lvd142m".
        checkpoint: the hub's "model.safetensors" of that model.
        layers: blocks whose outputs are the features, counted from 0.
        size_px: side that images are resized to; for DINOv2 a multiple of 14.
        arguments: further arguments of the model's constructor; ViTs take {"img_size": 224}.

    Raises:
        FileNotFoundError: in `load`, if the file does not exist.
        ValueError: if the file is not .safetensors, for arguments that name other weights, or in `load` if timm has no such
            model.
    """

    def __init__(
        self,
        name: str,
        checkpoint: str,
        layers: list[int],
        size_px: int | None = 224,
        arguments: dict[str, Any] | None = None,
    ) -> None:
        if not checkpoint.endswith(".safetensors"):
            raise ValueError(
                f"features.init_args.checkpoint must be a .safetensors file, got '{checkpoint}'; pickles are not opened."
            )
        self.name, self.checkpoint, self.layers, self.size_px = name, checkpoint, layers, size_px
        self.arguments = arguments or {}
        elsewhere = sorted(self.arguments.keys() & _OTHER_SOURCES)
        if elsewhere:
            raise ValueError(
                f"features.init_args.arguments has {', '.join(elsewhere)}, but weights come from the file "
                "features.init_args.checkpoint alone; remove it."
            )

    def load(self) -> FeatureNetwork:
        import timm  # slow to import, and only needed here

        if not timm.is_model(self.name):
            raise ValueError(
                f"timm has no model '{self.name}'; change features.init_args.name (timm.list_models('*dino*') lists some)."
            )
        if not Path(self.checkpoint).is_file():
            raise FileNotFoundError(
                f"there is no file '{self.checkpoint}'; give the weights of '{self.name}' as features.init_args.checkpoint."
            )
        # timm's own loader converts each model's files to its state dict.
        with without_hub():
            model: Any = timm.create_model(
                self.name, pretrained=True, pretrained_cfg_overlay={"file": self.checkpoint}, **self.arguments
            )
        config = model.pretrained_cfg
        return FeatureNetwork(_Intermediates(model, self.layers), config["mean"], config["std"], self.size_px)


class OpenClipFeatures:
    """The image tower of an open_clip model from a local folder.

    Args:
        folder: in open_clip's local layout: `open_clip_config.json` and safetensors weights.
        layers: transformer blocks whose outputs are the features, counted from 0.

    Raises:
        FileNotFoundError: in `load`, if the folder has another layout.
        ValueError: in `load`, for pickled weights, or a part that would come from the hub.
    """

    def __init__(self, folder: str, layers: list[int]) -> None:
        self.folder, self.layers = folder, layers

    def load(self) -> FeatureNetwork:
        import open_clip  # as timm above

        if not (Path(self.folder) / "open_clip_config.json").is_file():
            raise FileNotFoundError(
                f"no CLIP in open_clip layout at '{self.folder}' (open_clip_config.json is missing); change "
                "features.init_args.folder."
            )
        check_open_clip(Path(self.folder))
        with without_hub():
            model = open_clip.create_model(f"local-dir:{self.folder}", require_pretrained=True)
        config = model.visual.preprocess_cfg
        size = config["size"]
        size_px = size if isinstance(size, int) else size[0]
        backbone = _Intermediates(model.visual.float(), self.layers)
        return FeatureNetwork(backbone, config["mean"], config["std"], size_px)


class Dinov2Features:
    """DINOv2 in transformers' layout, from a local folder.

    Args:
        folder: with `config.json` and `model.safetensors`.
        layers: transformer blocks whose outputs are the features, counted from 0.
        size_px: side that images are resized to, a multiple of the patch size (14).

    Raises:
        FileNotFoundError: in `load`, if the folder has another layout.
        ValueError: in `load`, for pickled weights or code.
    """

    def __init__(self, folder: str, layers: list[int], size_px: int = 224) -> None:
        self.folder, self.layers, self.size_px = folder, layers, size_px

    def load(self) -> FeatureNetwork:
        from transformers import Dinov2Model  # as timm above

        if not (Path(self.folder) / "config.json").is_file():
            raise FileNotFoundError(
                f"no transformers model at '{self.folder}' (config.json is missing); change features.init_args.folder."
            )
        check_transformers(Path(self.folder))
        quiet_libraries()
        with torch.device("cpu"):  # transformers refuses to load under the memory plan's meta device
            model = Dinov2Model.from_pretrained(
                self.folder, dtype=torch.float32, local_files_only=True, use_safetensors=True
            )
        imagenet = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # what DINOv2 was trained with
        network = FeatureNetwork(_Dinov2Layers(model, self.layers), *imagenet, self.size_px)
        return network.to(torch.get_default_device())


class _Intermediates(nn.Module):
    """Outputs of selected blocks of a timm or open_clip network, as feature maps."""

    def __init__(self, network: nn.Module, layers: Sequence[int]) -> None:
        super().__init__()
        self.network, self.layers = network, list(layers)

    def forward(self, images: Tensor) -> list[Tensor]:
        taps: Any = self.network.forward_intermediates
        output = taps(
            images, indices=self.layers, stop_early=True, output_fmt="NCHW", intermediates_only=True
        )
        return cast(list[Tensor], output["image_intermediates"] if isinstance(output, dict) else output)


class _Dinov2Layers(nn.Module):
    """Patch tokens of selected layers of a transformers DINOv2, as feature maps."""

    def __init__(self, network: Any, layers: Sequence[int]) -> None:
        super().__init__()
        self.network, self.layers = network, list(layers)
        self.patch_px: int = network.config.patch_size

    def forward(self, images: Tensor) -> list[Tensor]:
        states = self.network(images, output_hidden_states=True).hidden_states
        height, width = (side // self.patch_px for side in images.shape[-2:])
        # states[0] is the embedding layer's output; the first token is the class token.
        maps = [states[layer + 1][:, 1:].transpose(1, 2) for layer in self.layers]
        return [tokens.unflatten(2, (height, width)) for tokens in maps]
