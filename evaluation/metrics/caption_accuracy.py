"""Caption accuracy: whether a classifier finds each attribute that the caption states in the image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn

from data.toy.attributes import NOT_STATED, attribute_table
from data.toy.world import parse_caption
from evaluation.metrics.estimates import Estimate, mean_estimate, share_estimate
from evaluation.metrics.sampled import SampledMetric
from evaluation.networks.network_features import full_precision


class Classifier(Protocol):
    """Predicts attributes of images; data/toy/training/classifier.py has the toy world's."""

    def right(self, images_uint8: Tensor, captions: Sequence[str]) -> Tensor:
        """(B, n) bool: whether each attribute matches the caption; True where the caption states nothing."""


def stated_attributes(captions: Sequence[str]) -> Tensor:
    """(B, n) bool: which attributes the captions of the toy world state."""
    return attribute_table([parse_caption(caption) for caption in captions]) != NOT_STATED


class CaptionAccuracy(SampledMetric):
    """Share of stated attributes that are correct, and share of images with all of them correct.

    Args:
        classifier: predicts the attributes; its weights are not part of the metric's state dict.
        stated: function from captions to the attributes that they state, (B, n) bool.
    """

    higher_is_better = True
    names = ("caption_accuracy", "attribute_accuracy")

    def __init__(
        self, classifier: Classifier, stated: Callable[[Sequence[str]], Tensor] = stated_attributes
    ) -> None:
        super().__init__()
        # In a tuple, so that nn.Module does not register a classifier that is itself a module.
        self._classifier = (classifier,)
        self._stated = stated

    @property
    def title(self) -> str:
        return "caption accuracy"

    def measure(self, images_uint8: Tensor, captions: Sequence[str] | None = None) -> Tensor:
        """(B, 3) per image: whether all attributes are correct, number of correct stated attributes, number of stated ones.

        Raises:
            ValueError: without captions.
        """
        if captions is None:
            raise ValueError("caption accuracy needs the captions of the images")
        classifier = self._classifier[0]
        if isinstance(classifier, nn.Module):
            classifier.to(images_uint8.device)
        with full_precision(images_uint8.device):
            right = classifier.right(images_uint8, captions)
        stated = self._stated(captions).to(right.device)
        all_right = (right | ~stated).all(dim=1)
        return torch.stack([all_right, (right & stated).sum(1), stated.sum(1)], dim=1).double()

    def compute(self) -> dict[str, Tensor]:
        """`attributes` and `all`, float64 scalars in [0, 1]; collective under torch.distributed.

        Raises:
            ValueError: if no rank had an image.
        """
        found = self.estimate()
        return {
            key: torch.tensor(found[name].value, dtype=torch.float64, device=self.device)
            for key, name in (("attributes", "attribute_accuracy"), ("all", "caption_accuracy"))
        }

    def estimate(self) -> dict[str, Estimate]:
        """The share of attributes is a ratio of sums; its interval comes from the delta method."""
        rows, ids = self.rows_of("fake")
        if len(rows) == 0:
            raise ValueError("caption accuracy needs at least 1 image, got 0")
        right, stated = rows[:, 1], rows[:, 2]
        share = right.sum() / stated.sum()
        attributes = replace(
            mean_estimate(share + (right - share * stated) / stated.mean(), ids), value=float(share)
        ).within(0.0, 1.0)
        images = share_estimate(rows[:, 0], ids)
        if float(share) in (0.0, 1.0):  # the delta method gives zero variance here
            attributes = replace(attributes, low=images.low, high=images.high)
        return {"caption_accuracy": images, "attribute_accuracy": attributes}
