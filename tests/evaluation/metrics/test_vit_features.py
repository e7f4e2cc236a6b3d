"""DINOv2 and CLIP image features: equality with the libraries, sizes, what enters the protocol's hash."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import Dinov2Config, Dinov2Model

from evaluation.metrics.frechet import FrechetDistance
from evaluation.networks.frozen_clip import FrozenClip
from evaluation.networks.network_features import Features
from evaluation.networks.vit_features import ClipImageFeatures, DinoV2Features
from tests.helpers.metric_networks import random_images

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dino")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Dinov2Model(
            Dinov2Config(
                hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
            )
        ).save_pretrained(out)
    return out


def test_dinov2_is_the_class_token_of_transformers(dino: Path) -> None:
    images = random_images(3, size=60)[..., :50]
    features = DinoV2Features(dino, px=28)
    arrays = images.permute(0, 2, 3, 1).numpy()
    resized = [np.asarray(Image.fromarray(a).resize((28, 28), Image.Resampling.BICUBIC)) for a in arrays]
    pixels = (torch.from_numpy(np.stack(resized)) / 255 - MEAN) / STD
    with torch.no_grad():
        expected = Dinov2Model.from_pretrained(dino).eval()(pixels.permute(0, 3, 1, 2)).pooler_output
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = features(images)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert features.dimensions == found.shape[1] == 16
    metric = FrechetDistance(features, name="fd_dinov2")
    metric.update(images, sample_ids=range(3))
    metric.update(random_images(4, size=60), sample_ids=range(4), real=True)
    assert metric.estimates()["fd_dinov2"].value > 0
    assert not isinstance(features, nn.Module)
    with pytest.raises(FileNotFoundError, match="there is no folder .* with a DINOv2 of transformers"):
        DinoV2Features(dino / "missing")


def test_clip_features_of_cmmd_have_length_one_and_are_squashed(clip: FrozenClip) -> None:
    features = ClipImageFeatures(clip)
    images = random_images(2)
    expected = torch.nn.functional.normalize(clip.image_features(images))
    torch.testing.assert_close(features(images), expected)  # of the right size: no resize in either
    wide = random_images(2, size=96)[..., :64, :]
    torch.testing.assert_close(features(wide).norm(dim=1), torch.ones(2))
    pixels = torch.nn.functional.interpolate(wide.double(), (32, 32), mode="bicubic", antialias=True).float()
    direct = torch.nn.functional.normalize(clip.features_of(clip.normalise(pixels)))
    torch.testing.assert_close(features(wide), direct, rtol=1e-4, atol=1e-5)


def test_identity_tells_networks_and_paths_apart(clip: FrozenClip, dino: Path) -> None:
    networks: list[Features] = [
        clip,
        ClipImageFeatures(clip),
        DinoV2Features(dino, 28),
        DinoV2Features(dino, 42),
    ]
    identities = [tuple(sorted(network.identity().items())) for network in networks]
    assert len(set(identities)) == 4
    again = DinoV2Features(dino, 28)
    assert again.identity() == networks[2].identity()
    next(again.network.parameters()).data += 1e-3
    assert again.identity() != networks[2].identity()
