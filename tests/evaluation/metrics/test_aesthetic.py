"""LAION's aesthetic heads on tiny weights, in the files' own layouts."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import normalize

from evaluation.metrics.clip_score import AestheticScore
from evaluation.networks.aesthetic import AestheticPredictor, read_head
from evaluation.networks.frozen_clip import FrozenClip
from tests.helpers.metric_networks import random_images
from tests.helpers.tiny_run import ROOT

CLIP = ROOT / "data" / "toy" / "clip"


def version_2(dimensions: int) -> nn.Module:
    """Layers and names of the second version; dropout does nothing in evaluation."""
    head = nn.Module()
    widths = (dimensions, 16, 8, 6, 4, 1)
    linear = [nn.Linear(a, b) for a, b in pairwise(widths)]
    head.layers = nn.Sequential(
        linear[0],
        nn.Dropout(0.2),
        linear[1],
        nn.Dropout(0.2),
        linear[2],
        nn.Dropout(0.1),
        linear[3],
        linear[4],
    )
    return head


def test_ratings_are_those_of_clip_and_head(tmp_path: Path) -> None:
    torch.manual_seed(0)
    clip = FrozenClip(CLIP)
    head = version_2(clip.dimensions).eval()
    folder = tmp_path / "clip"
    shutil.copytree(CLIP, folder)
    torch.save(head.state_dict(), folder / "aesthetic.pth")
    images = random_images(5, 32)
    metric = AestheticScore(AestheticPredictor(folder))
    metric.update(images, sample_ids=range(5))
    layers = head.layers
    assert isinstance(layers, nn.Sequential)
    with torch.no_grad():
        expected = layers(normalize(clip.image_features(images))).mean()
    found = metric.estimates()["aesthetic"]
    assert found.value == pytest.approx(float(expected), rel=1e-5) and found.samples == 5
    other = AestheticPredictor(folder).identity()
    (folder / "aesthetic.pth").unlink()
    save_file(
        {"weight": torch.ones(1, clip.dimensions), "bias": torch.zeros(1)}, folder / "aesthetic.safetensors"
    )
    first = AestheticPredictor(folder)  # version 1
    torch.testing.assert_close(first(images), normalize(clip.image_features(images)).sum(1))
    assert first.identity() != other


@pytest.mark.parametrize("wrong", ["width", "no output", "no layers"])
def test_files_without_such_a_head_are_refused(wrong: str, tmp_path: Path) -> None:
    states = {
        "width": {"weight": torch.ones(1, 7), "bias": torch.zeros(1)},
        "no output": {"weight": torch.ones(3, 8), "bias": torch.zeros(3)},
        "no layers": {"a": torch.ones(2)},
    }
    save_file(states[wrong], tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="holds no head of linear layers from 8 features to one number"):
        read_head(tmp_path / "x.safetensors", 8)


def test_the_file_of_the_head_is_asked_for(tmp_path: Path) -> None:
    for weights in (None, tmp_path / "none.pth", CLIP):
        with pytest.raises(FileNotFoundError, match="aesthetic needs the file of its head"):
            AestheticPredictor(weights)
