"""Caption accuracy: does the image show what the caption states, attribute by attribute, in the eyes of a classifier."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from data.toy.attributes import NOT_STATED, attribute_table
from data.toy.world import parse_caption
from evaluation.features import full_precision
from evaluation.summed import SummedMetric


class Classifier(Protocol):
    """What reads attributes off images; data/toy/classifier.py has the one of the toy world."""

    def right(self, images_uint8: Tensor, captions: Sequence[str]) -> Tensor:
        """(B, n) bool: whether each attribute is as the caption states it; True where it states nothing."""


def stated_attributes(captions: Sequence[str]) -> Tensor:
    """(B, n) bool: which attributes the captions of the toy world state."""
    return attribute_table([parse_caption(caption) for caption in captions]) != NOT_STATED


class CaptionAccuracy(SummedMetric):
    """Share of stated attributes that are right, and share of images with all of them right.

    Args:
        classifier: the judge; its weights are in no checkpoint unless the caller registers it elsewhere.
        stated: which columns of the classifier's answer the captions state.
    """

    higher_is_better = True
    attributes_right: Tensor
    attributes: Tensor
    images_right: Tensor
    images: Tensor

    def __init__(
        self, classifier: Classifier, stated: Callable[[Sequence[str]], Tensor] = stated_attributes
    ) -> None:
        super().__init__()
        # In a tuple, so that nn.Module does not register a classifier that is itself a module.
        self._classifier = (classifier,)
        self._stated = stated
        for name in ("attributes_right", "attributes", "images_right", "images"):
            self.add_sum(name, dtype=torch.int64)

    def update(self, images_uint8: Tensor, captions: Sequence[str]) -> None:
        """Add images (B,3,H,W) uint8 with their B captions; B may be 0.

        Raises:
            ValueError: unless there is one caption per image.
        """
        if len(images_uint8) != len(captions):
            raise ValueError(f"caption accuracy of {len(images_uint8)} images with {len(captions)} captions")
        if len(captions) == 0:
            return
        classifier = self._classifier[0]
        if isinstance(classifier, nn.Module):
            classifier.to(images_uint8.device)
        with full_precision(images_uint8.device):
            right = classifier.right(images_uint8, captions)
        stated = self._stated(captions).to(right.device)
        self.attributes_right += (right & stated).sum()
        self.attributes += stated.sum()
        self.images_right += (right | ~stated).all(dim=1).sum()
        self.images += len(captions)

    def compute(self) -> dict[str, Tensor]:
        """`attributes` and `all`, float64 scalars in [0, 1]; collective under torch.distributed.

        Raises:
            ValueError: if no rank had an image.
        """
        if int(self.images) == 0:
            raise ValueError("caption accuracy needs at least 1 image, got 0")
        return {
            "attributes": self.attributes_right.double() / self.attributes,
            "all": self.images_right.double() / self.images,
        }
