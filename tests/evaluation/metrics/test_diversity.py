"""Diversity: values by hand, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from evaluation.metrics.diversity import diversity
from evaluation.networks.frozen_clip import FrozenClip
from tests.helpers.tiny_run import ROOT


def test_distance_of_images_of_one_prompt() -> None:
    clip = FrozenClip(ROOT / "data/toy/clip")
    seen: list[tuple[list[str], list[int]]] = []

    def maker(captions: Sequence[str], sample_ids: Tensor) -> Tensor:
        seen.append((list(captions), sample_ids.tolist()))
        generator = torch.Generator().manual_seed(int(sample_ids[0]))
        return torch.randint(0, 256, (len(captions), 3, 32, 32), dtype=torch.uint8, generator=generator)

    found = diversity(maker, ["a", "b"], clip, samples_per_prompt=3)
    assert seen == [(["a"] * 3, [0, 1, 2]), (["b"] * 3, [3, 4, 5])]
    expected = []
    for start in (0, 3):
        features = clip.image_features(maker([""] * 3, torch.arange(start, start + 3))).double()
        unit = [row / row.norm() for row in features]
        pairs = [(0, 1), (0, 2), (1, 2)]
        expected.append(sum(float((unit[i] - unit[j]).norm()) for i, j in pairs) / 3)
    assert found == pytest.approx(sum(expected) / 2, rel=1e-6)


def test_equal_images_have_none() -> None:
    clip = FrozenClip(ROOT / "data/toy/clip")

    def maker(captions: Sequence[str], sample_ids: Tensor) -> Tensor:
        return torch.full((len(captions), 3, 32, 32), 100, dtype=torch.uint8)

    assert diversity(maker, ["a"], clip, samples_per_prompt=4) == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(ValueError, match="got 1 prompts and 1 samples"):
        diversity(maker, ["a"], clip, samples_per_prompt=1)
