"""Prompts with condition images and the images that they were made from: shards, or the toy world's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from data.conditions import Canny, Depth, Sketch, SoftEdge
from data.shards.datamodule import ShardDataModule
from data.toy.attributes import CLASSES
from data.toy.background_bar import BackgroundBar, background_bar
from data.toy.training.classifier import AttributeClassifier
from data.toy.world import Split, captions, image_at
from evaluation.metrics.control_adherence import (
    BarAdherence,
    ControlAdherence,
    DepthAdherence,
    EdgeAdherence,
    ReaderAdherence,
)
from sdxs_lightning.core.errors import UserError
from sdxs_lightning.core.image_condition import ImageCondition
from sdxs_lightning.core.latents import from_uint8, to_uint8
from sdxs_lightning.networks.condition_readers import ReaderNetwork

CONDITIONS = ("canny", "soft_edge", "sketch", "depth:FOLDER", "reader:FOLDER", "background_bar")
"""What `--condition` takes: how the condition is read off an image, to be compared with the one that was asked for."""

_MADE: dict[str, Callable[[], ImageCondition]] = {
    "canny": Canny,
    "soft_edge": SoftEdge,
    "sketch": Sketch,
    "background_bar": BackgroundBar,
}


class ControlledPrompts(NamedTuple):
    """Some samples of a control set."""

    captions: list[str]
    targets_uint8: Tensor
    """(B, 3, H, W), uint8: the images that the conditions belong to."""
    controls_uint8: Tensor
    """(B, 3, H, W), uint8: the condition images."""


class ControlSet(Protocol):
    """A numbered set of prompts with condition images."""

    count: int

    def batch(self, sample_ids: Sequence[int]) -> ControlledPrompts:
        """The samples of these numbers."""


class ToyControlSet:
    """Prompts of a split of the toy world, with conditions of its images.

    Args:
        split: "val" or "test".
        count: number of samples.
        condition: makes the condition images.

    Raises:
        UserError: for a reader.
    """

    def __init__(self, split: Split, count: int, condition: ImageCondition) -> None:
        _check_makes(condition, "take shards with cond.png as `control`")
        self.split, self.count, self.condition = split, count, condition

    def batch(self, sample_ids: Sequence[int]) -> ControlledPrompts:
        frames = [image_at(self.split, number) for number in sample_ids]
        controls = _stacked([self.condition(frame) for frame in frames])
        texts = [captions(self.split, 1, number)[0] for number in sample_ids]
        return ControlledPrompts(texts, _stacked(frames), controls)


class ShardControlSet:
    """Captions, images and condition images of shards, as `python -m data.prepare images` writes them, in stored order.

    Args:
        shards: a folder, glob or brace pattern.
        resolution: side to which images and conditions are resized and cropped.
        count: number of samples; None takes all.
        condition: makes the condition images of the images; None reads cond.png.

    Raises:
        UserError: if there are fewer samples, or for a reader.
    """

    def __init__(
        self, shards: str, resolution: int | None, count: int | None, condition: ImageCondition | None
    ) -> None:
        if condition is not None:
            _check_makes(condition, "leave out `make_conditions`, so that cond.png is read")
        self._data = ShardDataModule(
            shards,
            1,
            contents=["images", "control_images"],
            shuffle_window_shards=0,
            resolution=resolution,
            condition=condition,
        )
        try:
            self._data.setup()
        except (OSError, ValueError) as error:
            raise UserError(f"`control` '{shards}': {error}") from error
        assert self._data.dataset is not None
        self.count = count or len(self._data.dataset)
        if self.count > len(self._data.dataset):
            raise UserError(
                f"`control` '{shards}' holds {len(self._data.dataset)} samples, and {self.count} are wanted; set `samples` to "
                f"{len(self._data.dataset)}, or take a larger set."
            )

    def batch(self, sample_ids: Sequence[int]) -> ControlledPrompts:
        assert self._data.dataset is not None
        found = self._data.dataset.batch(list(sample_ids))
        assert found.images is not None and found.control_images is not None
        controls = (found.control_images * 255).round().to(torch.uint8)
        return ControlledPrompts(found.captions, to_uint8(found.images), controls)


class ReadCondition:
    """The condition that a trained reader reads off an image.

    Args:
        folder: of the reader. Not the one that the ControlNet was trained with, which it may have learnt to deceive: train a
            second one with another seed.

    Raises:
        ValueError: at the first image, for a reader of other conditions than grey or RGB.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder

    @cached_property
    def network(self) -> ReaderNetwork:
        """The reader, on the CPU."""
        network = ReaderNetwork.from_pretrained(self.folder)
        if network.channels not in (1, 3):
            raise ValueError(
                f"the reader in '{self.folder}' reads conditions of {network.channels} channels, and those of images have 3; "
                "train one with model.channels 3."
            )
        return network

    @torch.no_grad()
    def __call__(self, image: np.ndarray) -> np.ndarray:
        images = from_uint8(torch.from_numpy(image).permute(2, 0, 1)[None])
        read: Tensor = self.network(images)[0]
        pixels = (read * 255).round().to(torch.uint8).permute(1, 2, 0)
        return pixels.expand(-1, -1, 3).numpy()


class ClassifiedBar:
    """The toy world's background bar of the background that the attribute classifier sees.

    Args:
        classifier: the toy world's.
    """

    def __init__(self, classifier: AttributeClassifier) -> None:
        self._classifier = classifier

    @torch.no_grad()
    def __call__(self, image: np.ndarray) -> np.ndarray:
        images = from_uint8(torch.from_numpy(image).permute(2, 0, 1)[None])
        names = list(CLASSES)
        seen = int(self._classifier(images)[names.index("background")].argmax())
        return background_bar(CLASSES["background"][seen])


def made_by(condition: str) -> ImageCondition:
    """The condition of a name in CONDITIONS, as made from an image.

    Raises:
        UserError: for an unknown name.
    """
    kind, _, folder = condition.partition(":")
    if condition in _MADE:
        return _MADE[condition]()
    if kind in ("depth", "reader") and folder:
        return Depth(folder) if kind == "depth" else ReadCondition(folder)
    raise UserError(f"`condition` '{condition}' is none of {', '.join(CONDITIONS)}.")


def measurable(condition: ImageCondition) -> ImageCondition:
    """A condition for measuring: Canny's thresholds do not vary, since those of an output are not those of its target."""
    if isinstance(condition, Canny) and condition.vary:
        return Canny(condition.low, condition.high)
    return condition


def network_of(condition: ImageCondition) -> torch.nn.Module | None:
    """The network that reads a condition; None if it is no network."""
    if isinstance(condition, ReadCondition):
        return condition.network
    return condition.network if isinstance(condition, Depth) else None


def adherence_of(
    condition: ImageCondition, classifier: AttributeClassifier | None, tolerance_px: int = 1
) -> ControlAdherence:
    """The metric that compares the condition of the output with the one that was asked for.

    Args:
        condition: reads it; of a class of your own, the metric is the root mean square difference.
        classifier: the toy world's, for background_bar.
        tolerance_px: of edges: the decoder moves them by a pixel.

    Raises:
        UserError: for background_bar outside the toy world.
    """
    if isinstance(condition, BackgroundBar):
        if classifier is None:
            raise UserError("`condition` background_bar is the toy world's; use it with a toy protocol.")
        return BarAdherence(ClassifiedBar(classifier))
    if isinstance(condition, Depth):
        return DepthAdherence(condition)
    if isinstance(condition, Canny | SoftEdge | Sketch):
        return EdgeAdherence(condition, tolerance_px)
    return ReaderAdherence(condition)


def _check_makes(condition: ImageCondition, instead: str) -> None:
    if isinstance(condition, ReadCondition):
        raise UserError(
            f"a set's conditions are what is asked for, and the reader in '{condition.folder}' only guesses them from the "
            f"images; {instead}."
        )


def _stacked(frames: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).contiguous()
