"""Diversity: how far apart the images of one prompt are, which neither FID nor CLIP score shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from evaluation.images.generate import ImageMaker
from evaluation.metrics.estimates import Estimate, mean_estimate
from evaluation.metrics.feature_sets import FeatureSetMetric
from evaluation.networks.frozen_clip import FrozenClip


class PromptDiversity(FeatureSetMetric):
    """Mean over prompts of the mean distance between two images of a prompt, in features of length 1.

    The same number as `diversity`; image j of prompt i has the id i * samples_per_prompt + j.

    Args:
        features: a feature network; CLIP's image features are usual.
        samples_per_prompt: at least 2.
        name: of the number.

    Raises:
        ValueError: for fewer than two samples of a prompt; on computing, unless every prompt has as many.
    """

    higher_is_better = True

    def __init__(
        self, features: Callable[[Tensor], Tensor], samples_per_prompt: int, name: str = "diversity"
    ) -> None:
        # There is no real side.
        super().__init__(features, torch.zeros(0), (name,))
        if samples_per_prompt < 2:
            raise ValueError(f"{name} needs at least 2 samples of each prompt, got {samples_per_prompt}")
        self.samples_per_prompt = samples_per_prompt
        self.least = samples_per_prompt

    def _between(self) -> list[Estimate]:
        rows, ids = self.rows_of("fake")
        _, counts = (ids // self.samples_per_prompt).unique(return_counts=True)
        if not bool((counts == self.samples_per_prompt).all()):
            raise ValueError(
                f"{self.title} needs {self.samples_per_prompt} images of every prompt, found between {int(counts.min())} and "
                f"{int(counts.max())}; image j of prompt i has the id i * {self.samples_per_prompt} + j"
            )
        prompts = normalize(rows.double()).reshape(-1, self.samples_per_prompt, rows.shape[1])
        found = mean_estimate(torch.stack([torch.pdist(prompt).mean() for prompt in prompts]))
        return [Estimate(found.value, len(rows), found.low, found.high)]


def diversity(
    maker: ImageMaker,
    captions: Sequence[str],
    clip: FrozenClip,
    samples_per_prompt: int = 8,
    advance: Callable[[int], Any] = lambda images: None,
) -> float:
    """Mean over prompts of the mean distance between two images of a prompt, in CLIP's image features of length 1.

    0 where noise does not matter; sqrt(2) for features at right angles. It grows with errors too, so it is read beside the
    other scores, and against the many-step base's.

    Args:
        maker: makes the images; image j of prompt i has the number i * samples_per_prompt + j.
        captions: the prompts.
        clip: whose features.
        samples_per_prompt: at least 2.
        advance: called with the number of images that were made.

    Raises:
        ValueError: for fewer than two samples, or no prompt.
    """
    if samples_per_prompt < 2 or not captions:
        raise ValueError(
            f"diversity needs prompts and two samples of each, got {len(captions)} prompts and {samples_per_prompt} samples."
        )
    distances = []
    for index, caption in enumerate(captions):
        ids = torch.arange(index * samples_per_prompt, (index + 1) * samples_per_prompt)
        images = maker([caption] * samples_per_prompt, ids)
        distances.append(torch.pdist(normalize(clip.image_features(images).double())).mean())
        advance(samples_per_prompt)
    return float(torch.stack(distances).mean())
