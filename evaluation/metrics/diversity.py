"""Diversity: distance between images of the same prompt, which neither FID nor CLIP score measures."""

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
    """Mean over prompts of the mean pairwise distance between images of a prompt, in L2-normalised features.

    Equals `diversity`; image j of prompt i has the id i * samples_per_prompt + j.

    Args:
        features: a feature network; CLIP's image features are usual.
        samples_per_prompt: at least 2.
        name: name of the metric.

    Raises:
        ValueError: for fewer than two samples per prompt; in `compute`, unless all prompts have as many.
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
        # Unit vectors are at most 2 apart.
        found = mean_estimate(torch.stack([torch.pdist(prompt).mean() for prompt in prompts])).within(
            0.0, 2.0
        )
        return [Estimate(found.value, len(rows), found.low, found.high)]


def diversity(
    maker: ImageMaker,
    captions: Sequence[str],
    clip: FrozenClip,
    samples_per_prompt: int = 8,
    advance: Callable[[int], Any] = lambda images: None,
) -> float:
    """Mean over prompts of the mean pairwise distance between images of a prompt, in L2-normalised CLIP image features.

    0 if the noise has no effect; sqrt(2) for orthogonal features. It also grows with errors, so read it beside the other
    scores and the diversity of the many-step base.

    Args:
        maker: makes the images; image j of prompt i has the number i * samples_per_prompt + j.
        captions: the prompts.
        clip: the feature network.
        samples_per_prompt: at least 2.
        advance: called with the number of images made.

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
