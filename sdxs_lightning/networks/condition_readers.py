"""Differentiable networks that read a condition off an image, for losses that compare it with the one that was asked for.

A config names a *source*, which is cheap to construct and reads files only in `load`. The loaded network maps images
(B, 3, H, W) in [-1, 1] to condition images (B, C, H, W) in [0, 1] and passes gradients on to the images. One that reads
probabilities has a method `logits`, the same before the sigmoid, for the cross entropy.
"""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from sdxs_lightning.core.option_bounds import LARGEST_BLUR_PX
from sdxs_lightning.core.seeding import Stream, normal, uniform
from sdxs_lightning.families.folders import read_json
from sdxs_lightning.families.foreign import check_transformers
from sdxs_lightning.families.quiet import quiet_libraries

CONFIG_FILE, WEIGHTS_FILE = "config.json", "condition_reader.safetensors"


@runtime_checkable
class ConditionReader(Protocol):
    """Source of a reader, as named by `reader.class_path`."""

    def load(self) -> nn.Module:
        """Loads the network, float32, on the CPU (or on the device of a `torch.device` context)."""


class SoftEdgeReader:
    """The soft edges of `data.conditions.SoftEdge`, in torch: equal up to the rounding to bytes.

    Args:
        blur: standard deviation of the blur, in pixels; as in the condition.

    Raises:
        ValueError: unless blur is above 0 and up to 1000; of the network, for images that are smaller than half its filter.
    """

    def __init__(self, blur: float = 1.5) -> None:
        if not 0 < blur <= LARGEST_BLUR_PX:
            raise ValueError(
                f"SoftEdgeReader needs a blur above 0 pixels and up to {LARGEST_BLUR_PX}, got {blur}; see "
                "reader.init_args.blur."
            )
        self.blur = blur

    def load(self) -> nn.Module:
        return _SoftEdge(self.blur)


class DepthReader:
    """Relative depth, near white and far black, by a network of transformers, as `data.conditions.Depth` makes it.

    Args:
        model: folder of the network with its preprocessor_config.json, which says to what size images are resized: a smaller
            one there saves memory. Safetensors only.
        metric: the network predicts distances, which are negated, rather than inverse depth.

    Raises:
        FileNotFoundError: in `load`, if there is no such folder.
        ValueError: in `load`, for a folder with pickled weights or with code.
    """

    def __init__(self, model: str, metric: bool = False) -> None:
        self.model, self.metric = model, metric

    def load(self) -> nn.Module:
        from transformers import AutoImageProcessor, AutoModelForDepthEstimation  # slow to import

        if not (Path(self.model) / CONFIG_FILE).is_file():
            raise FileNotFoundError(
                f"there is no depth network in '{self.model}': expected a folder with config.json, "
                "preprocessor_config.json and model.safetensors as reader.init_args.model."
            )
        check_transformers(Path(self.model))
        quiet_libraries()
        processor: Any = AutoImageProcessor.from_pretrained(self.model, local_files_only=True)
        network = AutoModelForDepthEstimation.from_pretrained(
            self.model, use_safetensors=True, dtype=torch.float32, local_files_only=True
        )
        return _Depth(network, processor, self.metric)


class LearnedReader:
    """A predictor that was trained from (image, condition) pairs by `configs/<base>/control_reader.yaml`.

    Args:
        weights: the folder that the training wrote.

    Raises:
        FileNotFoundError: in `load`, if there is no such folder.
    """

    def __init__(self, weights: str) -> None:
        self.weights = weights

    def load(self) -> nn.Module:
        return ReaderNetwork.from_pretrained(self.weights)


class ReaderNetwork(nn.Module):
    """A convolutional encoder and decoder with skip connections, and a mean over the image at the bottom.

    The mean is for conditions that hold of the image as a whole. About 0.4 M parameters at the default widths.

    Args:
        channels: of the condition images.
        widths: channels at each resolution, from the image's down; each is half the one before.
        seed: of the initial weights.

    Raises:
        ValueError: without a channel, or without widths of 1 or more.
    """

    def __init__(self, channels: int = 3, widths: tuple[int, ...] = (16, 32, 64, 96), seed: int = 0) -> None:
        super().__init__()
        if channels < 1 or not widths or min(widths) < 1:
            raise ValueError(
                f"a condition reader needs channels and widths of 1 or more, got channels {channels} and widths {list(widths)}."
            )
        self.channels, self.widths = channels, tuple(widths)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.stem = _layer(3, widths[0])
            pairs = list(pairwise(widths))
            self.down = nn.ModuleList(_layer(above, below, stride=2) for above, below in pairs)
            self.whole = nn.Linear(widths[-1], widths[-1])
            self.up = nn.ModuleList(_layer(below + above, above) for above, below in reversed(pairs))
            self.head = nn.Conv2d(widths[0], channels, 3, padding=1)

    def logits(self, images: Tensor) -> Tensor:
        """Condition images before the sigmoid.

        Args:
            images: (B, 3, H, W), float, in [-1, 1]; H and W at least 2^(number of widths).

        Raises:
            ValueError: for smaller images, of which a single pixel would be left.
        """
        if min(images.shape[-2:]) < 2 ** len(self.widths):
            raise ValueError(
                f"a condition reader of {len(self.widths)} widths reads images from {2 ** len(self.widths)} pixels on, got "
                f"{images.shape[-2]}x{images.shape[-1]}; give it fewer widths."
            )
        features = [self.stem(images.to(self.head.weight.dtype))]
        for layer in self.down:
            features.append(layer(features[-1]))
        mean = self.whole(features[-1].mean(dim=(2, 3)))
        state = features.pop() + mean[:, :, None, None]
        for layer in self.up:
            above = features.pop()
            state = layer(torch.cat([F.interpolate(state, size=above.shape[-2:]), above], dim=1))
        logits: Tensor = self.head(state)
        return logits

    def forward(self, images: Tensor) -> Tensor:
        """Condition images (B, C, H, W) in [0, 1] of images (B, 3, H, W) in [-1, 1]."""
        return self.logits(images).sigmoid()

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> ReaderNetwork:
        """Loads a reader, in float32.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: for unreadable files, weights of another network, or NaN.
        """
        folder = Path(folder)
        if not (folder / WEIGHTS_FILE).is_file() or not (folder / CONFIG_FILE).is_file():
            raise FileNotFoundError(
                f"there is no condition reader in '{folder}' ({CONFIG_FILE} and {WEIGHTS_FILE}); train one from your pairs "
                "with `python train.py --config configs/toy/control_reader.yaml`, or give its folder as "
                "reader.init_args.weights."
            )
        config = read_json(folder / CONFIG_FILE)
        channels, widths = config.get("channels"), config.get("widths")
        if not isinstance(channels, int) or not (
            isinstance(widths, list) and all(isinstance(one, int) for one in widths)
        ):
            raise ValueError(f"'{folder / CONFIG_FILE}' has no channels and widths of a condition reader.")
        reader = cls(channels, tuple(widths))
        if torch.get_default_device().type == "meta":
            return reader
        try:
            weights = {name: value.float() for name, value in load_file(folder / WEIGHTS_FILE).items()}
            reader.load_state_dict(weights)
        except (RuntimeError, SafetensorError) as error:
            raise ValueError(
                f"'{folder / WEIGHTS_FILE}' is cut off, or does not fit its {CONFIG_FILE} ({error})."
            ) from error
        broken = next((name for name, value in weights.items() if not value.isfinite().all()), None)
        if broken is not None:
            raise ValueError(f"'{folder / WEIGHTS_FILE}' has NaN or infinity in {broken}; train it again.")
        return reader.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config and weights, the latter in their dtype."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_FILE).write_text(
            json.dumps({"channels": self.channels, "widths": self.widths}) + "\n"
        )
        save_file({name: v.contiguous() for name, v in self.state_dict().items()}, folder / WEIGHTS_FILE)


def diffused(images: Tensor, noise: float, seed: int, positions: Tensor) -> Tensor:
    """Images sqrt(1 - sigma^2) x + sigma n, with a sigma for each that is uniform in [0, noise].

    A reader of such images knows the condition at every level of the diffusion, so that its gradient changes what is seen and
    not single pixels, and is not flat where a clean image leaves no doubt.

    Args:
        images: (B, 3, H, W), float, about [-1, 1].
        noise: largest sigma, below 1; 0 changes nothing.
        seed: of the run.
        positions: (B,), int64, of the samples in the run.
    """
    if noise == 0:
        return images
    drawn = normal(seed, Stream.READER_NOISE, positions, tuple(images.shape[1:]))
    sigma = noise * uniform(seed, Stream.READER_NOISE_STRENGTH, positions)[:, None, None, None]
    return (1 - sigma.square()).sqrt() * images + sigma * drawn


def _layer(channels_in: int, channels_out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1),
        nn.GroupNorm(math.gcd(8, channels_out), channels_out),
        nn.SiLU(),
        nn.Conv2d(channels_out, channels_out, 3, padding=1),
        nn.SiLU(),
    )


class _SoftEdge(nn.Module):
    """Source: Scharr, 2000; see `data.conditions.SoftEdge`."""

    def __init__(self, blur: float) -> None:
        super().__init__()
        self.blur = blur
        # OpenCV's size of a Gaussian for float images, and its borders ("reflect" is BORDER_REFLECT_101).
        side = round(blur * 8 + 1) | 1
        place = torch.arange(side) - side // 2
        kernel = (-(place**2) / (2 * blur**2)).exp()
        self.register_buffer("kernel", kernel / kernel.sum(), persistent=False)
        scharr = torch.tensor([[-3.0, 0.0, 3.0], [-10.0, 0.0, 10.0], [-3.0, 0.0, 3.0]])
        self.register_buffer("scharr", torch.stack([scharr, scharr.T])[:, None], persistent=False)

    kernel: Tensor
    scharr: Tensor

    def forward(self, images: Tensor) -> Tensor:
        batch, channels, height, width = images.shape
        bytes_like = ((images.float() + 1) * 127.5).reshape(batch * channels, 1, height, width)
        half = len(self.kernel) // 2
        if half >= min(height, width):
            raise ValueError(
                f"SoftEdgeReader with a blur of {self.blur:g} pixels reads images from {half + 1} pixels on, got "
                f"{height}x{width}; give a smaller reader.init_args.blur."
            )
        padded = F.pad(bytes_like, (half, half, half, half), mode="reflect")
        smooth = F.conv2d(F.conv2d(padded, self.kernel[None, None, None]), self.kernel[None, None, :, None])
        gradient = F.conv2d(F.pad(smooth, (1, 1, 1, 1), mode="reflect"), self.scharr)
        # The root's slope is infinite at 0, where a flat image is.
        strength = (gradient.square().sum(dim=1) + 1e-12).sqrt().view(batch, channels, height, width).amax(1)
        full = torch.stack([torch.quantile(one.detach().flatten(), 0.99) for one in strength]).clamp_min(1.0)
        edges = (strength / full[:, None, None]).clamp_max(1.0)
        return edges[:, None].expand(-1, 3, -1, -1)


class _Depth(nn.Module):
    """Does in float, with a graph, what the processor does with bytes: resize, then normalise."""

    def __init__(self, network: nn.Module, processor: Any, metric: bool) -> None:
        super().__init__()
        self.network, self.processor, self.metric = network, processor, metric
        self.resampling = {0: "nearest", 2: "bilinear"}.get(int(processor.resample), "bicubic")
        """Of Pillow's numbers; the rest are bicubic and its like."""
        self._sizes: dict[tuple[int, int], tuple[int, int]] = {}
        for name in ("mean", "std"):
            values = torch.tensor(getattr(processor, f"image_{name}")).view(1, 3, 1, 1)
            self.register_buffer(name, values, persistent=False)

    mean: Tensor
    std: Tensor

    def forward(self, images: Tensor) -> Tensor:
        size = images.shape[-2], images.shape[-1]
        smooth = self.resampling != "nearest"
        resized = F.interpolate(
            (images.float() + 1) / 2, self.size_of(size), mode=self.resampling, antialias=smooth
        )
        # Bytes cannot overshoot.
        normalised = ((resized.clamp(0, 1) - self.mean.float()) / self.std.float()).to(self.mean.dtype)
        depth = self.network(pixel_values=normalised).predicted_depth[:, None].float()
        depth = F.interpolate(depth, size, mode="bicubic", align_corners=False)
        depth = -depth if self.metric else depth
        low, high = depth.amin((1, 2, 3), keepdim=True), depth.amax((1, 2, 3), keepdim=True)
        scale = torch.where(high > low, high - low, 1.0)
        return ((depth - low) / scale).expand(-1, 3, -1, -1)

    def size_of(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width to which the processor resizes images of a size."""
        if size not in self._sizes:
            with torch.device("cpu"):
                blank = self.processor(images=np.zeros((*size, 3), np.uint8), return_tensors="pt")
            height, width = blank["pixel_values"].shape[-2:]
            self._sizes[size] = height, width
        return self._sizes[size]
