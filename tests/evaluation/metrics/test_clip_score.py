"""The frozen CLIP: equality with open_clip, precision, long captions, what it refuses."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from torch import nn

from evaluation.metrics.clip_score import ClipScore
from evaluation.metrics.frechet import FeatureStatistics, FrechetDistance
from evaluation.networks.frozen_clip import FrozenClip
from tests.helpers.metric_networks import CONTEXT_LENGTH, random_images

CAPTIONS = [
    "a red circle above a blue square",
    "a small pink heart on a navy background",
    "an orange ring left of a cyan cross",
    "a large green triangle on a white background",
]


def directly(folder: Path, images_uint8: torch.Tensor) -> torch.Tensor:
    """100 * cos by open_clip's own functions, from PIL images through its own transform."""
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    model.eval()
    arrays = images_uint8.permute(0, 2, 3, 1).numpy()
    pixels = torch.stack([transform(Image.fromarray(array)) for array in arrays])
    token_ids = open_clip.get_tokenizer(f"local-dir:{folder}")(CAPTIONS)
    with torch.no_grad():
        image_features = model.encode_image(pixels, normalize=True)
        text_features = model.encode_text(token_ids, normalize=True)
    scores: torch.Tensor = 100 * (image_features * text_features).sum(-1)
    return scores


def test_equals_open_clip(clip: FrozenClip, clip_folder: Path) -> None:
    images = random_images(4)
    metric = ClipScore(clip)
    metric.update(images[:1], CAPTIONS[:1])
    metric.update(images[1:], CAPTIONS[1:])
    metric.update(images[:0], [])
    expected = float(directly(clip_folder, images).mean())
    assert float(metric.compute()) / 100 == pytest.approx(expected / 100, abs=1e-6)


def test_other_sizes_are_resized_as_open_clip_does(clip: FrozenClip, clip_folder: Path) -> None:
    images = random_images(4, size=80)[..., :64]
    metric = ClipScore(clip)
    metric.update(images, CAPTIONS)
    assert float(metric.compute()) == pytest.approx(float(directly(clip_folder, images).mean()), abs=0.05)


def test_long_captions_keep_their_end_and_differ(clip: FrozenClip) -> None:
    end = " on a gray background above a blue square left of a cyan ring"
    first, second = "a small red circle" + end, "a large pink heart" + end
    token_ids = clip.tokenize([first, second])
    assert token_ids.shape == (2, CONTEXT_LENGTH)
    assert (token_ids[:, -1] == clip.eos_token_id).all()
    features = clip.text_features([first, second])
    assert not torch.allclose(features[0], features[1], atol=1e-4)


def test_a_tokenizer_that_cuts_the_end_off_is_repaired(clip: FrozenClip) -> None:
    clip.tokenizer = lambda captions: torch.arange(1, CONTEXT_LENGTH + 1).repeat(len(captions), 1)
    token_ids = clip.tokenize(["anything"])
    assert token_ids[0, -1] == clip.eos_token_id
    assert token_ids[0, :-1].tolist() == list(range(1, CONTEXT_LENGTH))


def test_autocast_changes_no_bit(clip: FrozenClip) -> None:
    images = random_images(8)
    reference = FeatureStatistics.from_features(clip.image_features(random_images(30, seed=1)))
    outcomes = []
    for enabled in (False, True):
        fid, score = FrechetDistance(clip.image_features, clip.dimensions, reference), ClipScore(clip)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            fid.update(images)
            score.update(images[:4], CAPTIONS)
            outcomes.append((float(fid.compute()), float(score.compute())))
    assert outcomes[0] == outcomes[1]


def test_judges_are_in_no_checkpoint_and_never_train(clip: FrozenClip) -> None:
    owner = nn.Module()
    owner.fid = FrechetDistance(clip.image_features, clip.dimensions)
    owner.score = ClipScore(clip)
    owner.train()
    assert list(owner.state_dict()) == []
    assert list(owner.parameters()) == []
    assert not any(module.training for module in clip.model.modules())
    assert not any(parameter.requires_grad for parameter in clip.model.parameters())


def test_floats_and_missing_folders_are_refused(clip: FrozenClip, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"uint8 in 0..255, got torch.float32"):
        clip.image_features(torch.rand(1, 3, 32, 32))
    with pytest.raises(FileNotFoundError, match=r"open_clip_config\.json is missing"):
        FrozenClip(tmp_path)


def test_one_caption_per_image(clip: FrozenClip) -> None:
    with pytest.raises(ValueError, match="2 images with 1 captions"):
        ClipScore(clip).update(random_images(2), ["a red circle"])
    with pytest.raises(ValueError, match="at least 1 image"):
        ClipScore(clip).compute()
