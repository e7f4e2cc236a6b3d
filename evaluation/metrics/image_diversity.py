"""Diversity: how far images of one prompt are apart, which neither FID nor a caption's score can say of a student."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.functional import normalize

from evaluation.images.generate import ImageMaker
from evaluation.networks.frozen_clip import FrozenClip


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
        advance: told how many images were made.

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
