"""A network that measures a run never trains it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from data.toy.training.classifier import AttributeClassifier
from data.toy.training.features import ClassifierFeatures
from evaluation.callbacks.independence import require_independent
from evaluation.callbacks.sample_grids import DistillationMetrics
from evaluation.networks.frozen_clip import FrozenClip
from evaluation.networks.vit_features import ClipImageFeatures, DinoV2Features
from evaluation.protocols.protocols import REPOSITORY
from sdxs_lightning.core.errors import UserError
from sdxs_lightning.networks.image_features import Dinov2Features, OpenClipFeatures
from tests.helpers.tiny_decoding import pixel_gan, save_dinov2
from tests.helpers.tiny_distillation import distillation, fit

TOY = REPOSITORY / "data" / "toy"


def metric_networks() -> list[object]:
    return [FrozenClip(TOY / "clip"), AttributeClassifier.from_pretrained(TOY / "classifier")]


def test_the_toy_recipes_train_through_another_network() -> None:
    features = ClassifierFeatures(str(TOY / "perceptual")).load()
    require_independent(metric_networks(), {"image_features": features})
    require_independent(metric_networks(), {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_tower_of_a_metric_network_is_found_at_any_precision(dtype: torch.dtype) -> None:
    tower = OpenClipFeatures(str(TOY / "clip"), layers=[0]).load().to(dtype)
    with pytest.raises(
        UserError, match="trains through image_features, which is the network 'clip-clip' of its"
    ):
        require_independent(metric_networks(), {"image_features": tower})
    first_stages = ClassifierFeatures(str(TOY / "classifier"), stages=(0,)).load().to(dtype)
    with pytest.raises(UserError, match="through heads, which is the network 'AttributeClassifier' of its"):
        require_independent(metric_networks(), {"heads": first_stages})


def test_metric_networks_of_published_protocols(tmp_path: Path, clip: FrozenClip) -> None:
    folder = save_dinov2(tmp_path / "dinov2")
    network = Dinov2Features(str(folder), layers=[0], size_px=28).load()
    require_independent([clip, ClipImageFeatures(clip)], {"image_features": network})
    with pytest.raises(UserError, match=clip.name):
        require_independent([ClipImageFeatures(clip)], {"image_features": clip.model})
    with pytest.raises(UserError, match="'dinov2-dinov2'"):
        require_independent([clip, DinoV2Features(folder)], {"image_features": network})


def test_constant_weights_are_ignored() -> None:
    fresh = [nn.Linear(16, 16, bias=False) for _ in range(2)]
    for one in fresh:
        nn.init.zeros_(one.weight)
    require_independent([fresh[0]], {"zeros": fresh[1]})
    nn.init.normal_(fresh[0].weight)
    with pytest.raises(UserError):
        require_independent([fresh[0]], {"itself": fresh[0]})


def test_a_run_that_trains_through_a_metric_network_is_refused_before_its_first_step(
    world: Path, toy_networks: dict[str, str], tmp_path: Path
) -> None:
    parts = pixel_gan(tmp_path) | {"image_features": OpenClipFeatures(toy_networks["clip"], layers=[0])}
    module = distillation(world / "sd-epsilon", gan=False, **parts)
    with pytest.raises(UserError, match="trains through image_features, which is the network"):
        fit(module, world / "shards", 4, callbacks=[DistillationMetrics(1)], default_root_dir=tmp_path)
    assert module.student_updates == 0
