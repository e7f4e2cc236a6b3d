"""Condition images made from images: edges, soft edges, sketches, depth. For training ControlNets, and for evaluating them.

Each is called with an image and returns a condition image of the same size; so may a class of your own.
In YAML:

    data:
      init_args:
        contents: [images, control_images]
        condition: {class_path: data.conditions.Canny, init_args: {low: 100, high: 200}}

Without `condition`, control images are read from the shards (`cond.png`): given ones, or ones made beforehand by
`python -m data.prepare images --condition ...`, which is the better way for a network such as `Depth`.
"""

from __future__ import annotations

import math
import zlib
from functools import cached_property
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from data.shards.images import Pixels
from sdxs_lightning.core.errors import UserError
from sdxs_lightning.core.hub_ids import is_hub_id
from sdxs_lightning.core.image_condition import ImageCondition
from sdxs_lightning.core.option_bounds import LARGEST_BLUR_PX

__all__ = ["Canny", "Depth", "ImageCondition", "Sketch", "SoftEdge"]

_Floats = NDArray[np.float32]
_MOST_VARIED = 100
"""Beyond it `vary` is a typing error; the condition is black."""


class UnloadableConditionError(UserError, ValueError):
    """A condition cannot work at all: no sample is to blame for it."""


class Canny:
    """White edges on black, by OpenCV's Canny on the colour image, as for ControlNet's conditions.

    Args:
        low: gradients from here on continue an edge.
        high: gradients from here on start an edge. 100 and 200 are the defaults of ControlNet's demo.
        vary: both are multiplied by a factor from 1 / (1 + vary) to 1 + vary, which a hash of the image draws, so that a
            ControlNet works with sparse and with dense edges; 0 varies nothing.

    Raises:
        ValueError: unless 0 <= low <= high and vary is from 0 to 100.

    Source: Canny, "A computational approach to edge detection", PAMI 1986; ControlNet, arXiv:2302.05543, section 4.
    """

    def __init__(self, low: int = 100, high: int = 200, vary: float = 0.0) -> None:
        if not 0 <= low <= high < math.inf:
            raise ValueError(
                f"Canny needs 0 <= low <= high, got low {low} and high {high}; see data.condition."
            )
        if not 0 <= vary <= _MOST_VARIED:
            raise ValueError(f"Canny needs a vary from 0 to {_MOST_VARIED}, got {vary}; see data.condition.")
        self.low, self.high, self.vary = low, high, vary

    def __call__(self, image: Pixels) -> Pixels:
        image = np.ascontiguousarray(image)
        low, high = float(self.low), float(self.high)
        if self.vary:
            # Of the image, so that it is the same at every visit and after a resume.
            drawn = zlib.crc32(image.tobytes()) / 2**32
            factor = (1 + self.vary) ** (2 * drawn - 1)
            low, high = low * factor, high * factor
        edges: Any = cv2.Canny(image, low, high)
        return _three(edges)


class SoftEdge:
    """Edges of graded strength, white on black: the gradient of the smoothed image.

    The strongest of the three channels' Scharr gradients after a Gaussian blur, divided by its own 99th percentile. It is a
    filter, not a network such as HED or PiDiNet, which know the edges of objects; those can be used as a class of your own.

    Args:
        blur: standard deviation of the blur, in pixels.

    Raises:
        ValueError: unless blur is positive.

    Source: Scharr, "Optimale Operatoren in der digitalen Bildverarbeitung", 2000.
    """

    def __init__(self, blur: float = 1.5) -> None:
        _check_blur("SoftEdge", blur)
        self.blur = blur

    def __call__(self, image: Pixels) -> Pixels:
        smooth = cv2.GaussianBlur(image.astype(np.float32), (0, 0), self.blur)
        across, down = cv2.Scharr(smooth, cv2.CV_32F, 1, 0), cv2.Scharr(smooth, cv2.CV_32F, 0, 1)
        strength: _Floats = np.sqrt(across**2 + down**2).max(axis=2)
        # A uniform image has gradients of rounding errors only, which are no edges: 1 is a thirtieth of a grey level per pixel.
        full = max(float(np.percentile(strength, 99)), 1.0)
        return _three(_bytes(strength / full))


class Sketch:
    """White strokes on black, like pen drawings: the extended difference of Gaussians, inverted.

    u = 1 + p (G_s - G_ks) / G_ks of the grey image is 1 on uniform areas; below a threshold there is a stroke, softened by
    tanh. We depart from the paper by the quotient: without it every dark area would be filled with ink.

    Args:
        blur: s, standard deviation of the finer blur, in pixels; k is 1.6.
        sharpness: p, the weight of the difference.
        threshold: of u.

    Raises:
        ValueError: unless blur is positive, and sharpness and threshold are finite.

    Source: after Winnemoeller et al., "XDoG: An eXtended difference-of-Gaussians compendium", 2012.
    """

    _RATIO = 1.6
    _PHI = 10.0

    def __init__(self, blur: float = 1.0, sharpness: float = 20.0, threshold: float = 0.4) -> None:
        _check_blur("Sketch", blur)
        for name, value in (("sharpness", sharpness), ("threshold", threshold)):
            if not math.isfinite(value):
                raise ValueError(
                    f"Sketch needs a finite {name}, got {value}; see data.condition.init_args.{name}."
                )
        self.blur, self.sharpness, self.threshold = blur, sharpness, threshold

    def __call__(self, image: Pixels) -> Pixels:
        grey = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY).astype(np.float32) / 255
        fine = cv2.GaussianBlur(grey, (0, 0), self.blur)
        coarse = cv2.GaussianBlur(grey, (0, 0), self.blur * self._RATIO)
        # At least a tenth of white, or the noise of black areas would be drawn.
        sharpened = 1 + self.sharpness * (fine - coarse) / np.maximum(coarse, 0.1)
        ink = np.tanh(self._PHI * (self.threshold - sharpened))
        return _three(_bytes(np.where(sharpened < self.threshold, ink, 0.0)))


class Depth:
    """Relative depth, near white and far black, by a network of transformers (DPT, Depth Anything, ZoeDepth, ...).

    The network is loaded at the first image, once per process. On a CPU an image takes about a second: compute depth
    beforehand (`python -m data.prepare images --condition depth:FOLDER`) rather than while training.

    Args:
        model: folder or hub id of the network with its preprocessor_config.json; safetensors only.
        device: where it runs.
        metric: the network predicts distances, which are negated, rather than inverse depth.
    """

    def __init__(self, model: str, device: str = "cpu", metric: bool = False) -> None:
        self.model, self.device, self.metric = model, device, metric

    @torch.no_grad()
    def __call__(self, image: Pixels) -> Pixels:
        depth = self.depth(image)
        depth = -depth if self.metric else depth
        low, high = float(depth.min()), float(depth.max())
        return _three(_bytes((depth - low) / ((high - low) or 1.0)))

    @torch.no_grad()
    def depth(self, image: Pixels) -> _Floats:
        """The prediction of the network at the size of the image: (H, W), float32, unscaled."""
        processor, network = self._loaded
        inputs = processor(images=image, return_tensors="pt").to(self.device)
        predicted = network(**inputs).predicted_depth[:, None].float()
        resized = torch.nn.functional.interpolate(
            predicted, size=image.shape[:2], mode="bicubic", align_corners=False
        )
        found: _Floats = resized[0, 0].cpu().numpy()
        return found

    @property
    def network(self) -> torch.nn.Module:
        """The depth network.

        Raises:
            UnloadableConditionError: if there is none.
        """
        network: torch.nn.Module = self._loaded[1]
        return network

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        # Here, because importing takes seconds and no other condition needs it.
        from transformers import AutoImageProcessor, AutoModelForDepthEstimation

        folder = Path(self.model)
        local = folder.is_dir()
        if not local and not is_hub_id(self.model):
            raise UnloadableConditionError(
                f"Depth: there is no folder '{self.model}'; give a folder with config.json, preprocessor_config.json and "
                "model.safetensors, or a hub id (org/name), as data.condition.init_args.model."
            )
        try:
            processor = AutoImageProcessor.from_pretrained(
                self.model, local_files_only=local, trust_remote_code=False
            )
            network = AutoModelForDepthEstimation.from_pretrained(
                self.model,
                use_safetensors=True,
                dtype=torch.float32,
                local_files_only=local,
                trust_remote_code=False,
            )
        except (OSError, ValueError) as error:
            first_line = str(error).strip().splitlines()[0]
            raise UnloadableConditionError(
                f"Depth: '{self.model}' cannot be loaded as a depth network of transformers ({first_line}); see "
                "data.condition.init_args.model."
            ) from error
        return processor, network.to(self.device).eval()

    def __getstate__(self) -> dict[str, Any]:
        """Without the network, which every process loads itself."""
        return {name: value for name, value in self.__dict__.items() if name != "_loaded"}


def _check_blur(name: str, blur: float) -> None:
    if not 0 < blur <= LARGEST_BLUR_PX:
        raise ValueError(
            f"{name} needs a blur above 0 pixels and up to {LARGEST_BLUR_PX}, got {blur}; see data.condition.init_args.blur."
        )


def _three(grey: Pixels) -> Pixels:
    return np.repeat(grey[:, :, None], 3, axis=2)


def _bytes(values: _Floats) -> Pixels:
    """From [0, 1], clipped, to the nearest byte."""
    rounded: Pixels = np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8)
    return rounded
