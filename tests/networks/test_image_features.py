"""Feature networks: the same numbers as the libraries' own forward passes, gradients to images, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import Dinov2Model

from data.toy.training.classifier import AttributeClassifier
from data.toy.training.features import ClassifierFeatures
from sdxs_lightning.networks.image_features import (
    Dinov2Features,
    FeatureNetwork,
    OpenClipFeatures,
    TimmFeatures,
)
from tests.helpers.tiny_decoding import save_dinov2
from tests.helpers.tiny_run import ROOT

IMAGENET = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
TINY_VIT: dict[str, Any] = {"embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": 32, "patch_size": 8}


def images(side: int = 32) -> Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


def normalised(batch: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return ((batch + 1) / 2 - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)


def test_dinov2_gives_patch_tokens_as_maps(tmp_path: Path) -> None:
    folder = save_dinov2(tmp_path / "dinov2")
    network = Dinov2Features(str(folder), layers=[0, 1], size_px=32).load()
    model = Dinov2Model.from_pretrained(folder)
    states = model(normalised(images(), *IMAGENET), output_hidden_states=True).hidden_states
    found = network(images())
    for part, state in zip(found, states[1:], strict=True):
        assert part.shape == (2, 16, 4, 4)
        torch.testing.assert_close(part.flatten(2).transpose(1, 2), state[:, 1:])
    assert network.shapes(32) == [(16, 4, 4), (16, 4, 4)]


def test_timm_reads_a_local_file(tmp_path: Path) -> None:
    model: Any = timm.create_model("vit_tiny_patch16_224", **TINY_VIT).eval()
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    arguments = TINY_VIT | {"num_classes": 1000}
    source = TimmFeatures("vit_tiny_patch16_224", str(tmp_path / "vit.safetensors"), [1], 32, arguments)
    network = source.load().eval()
    halves = torch.full((3,), 0.5), torch.full((3,), 0.5)
    tokens = model.blocks(model._pos_embed(model.patch_embed(normalised(images(), *halves))))
    (found,) = network(images())
    torch.testing.assert_close(found.flatten(2).transpose(1, 2), tokens[:, 1:], rtol=1e-4, atol=1e-5)


def test_open_clip_reads_the_toy_folder() -> None:
    folder = str(ROOT / "data/toy/clip")
    network = OpenClipFeatures(folder, layers=[0, 2]).load().eval()
    visual = open_clip.create_model(f"local-dir:{folder}", require_pretrained=True).float().eval().visual
    outputs: list[Tensor] = []
    for block in visual.transformer.resblocks:
        block.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    with torch.no_grad():
        visual(images())
        found = network(images())  # mean and std are 0.5: [-1, 1] again
    for part, tokens in zip(found, (outputs[0], outputs[2]), strict=True):
        assert part.shape == (2, 96, 8, 8)
        torch.testing.assert_close(part.flatten(2).transpose(1, 2), tokens[:, 1:], rtol=1e-4, atol=1e-5)


def test_classifier_stages() -> None:
    folder = str(ROOT / "data/toy/classifier")
    network = ClassifierFeatures(folder, stages=(1, 3)).load()
    layers = AttributeClassifier.from_pretrained(folder).features
    with torch.no_grad():
        found = network(images())
        torch.testing.assert_close(found[0], layers[:2](images()))
        torch.testing.assert_close(found[1], layers[:4](images()))
    assert network.shapes(32) == [(64, 16, 16), (96, 8, 8)]


class Pixels(torch.nn.Module):
    def forward(self, batch: Tensor) -> list[Tensor]:
        return [batch]


def test_images_are_resized_without_aliases_and_gradients_reach_them() -> None:
    network = FeatureNetwork(Pixels(), (0.5,) * 3, (0.5,) * 3, size_px=8)
    batch = images().requires_grad_()
    (found,) = network(batch)
    torch.testing.assert_close(found, F.interpolate(batch, (8, 8), mode="bilinear", antialias=True))
    found.sum().backward()
    assert batch.grad is not None and (batch.grad != 0).all()
    stripes = torch.ones(1, 3, 32, 32)
    stripes[..., ::2] = -1
    assert network(stripes)[0].abs().max() < 0.1
    assert network.to(torch.bfloat16)(images())[0].dtype == torch.bfloat16


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must be a .safetensors file, got 'x.pth'; pickles are not opened"):
        TimmFeatures("vit_tiny_patch16_224", "x.pth", [1])
    with pytest.raises(FileNotFoundError, match=r"no file 'x.safetensors'; give the weights of 'vit_tiny"):
        TimmFeatures("vit_tiny_patch16_224", "x.safetensors", [1]).load()
    with pytest.raises(ValueError, match="timm has no model 'vit_nobody'"):
        TimmFeatures("vit_nobody", "x.safetensors", [1]).load()
    with pytest.raises(
        FileNotFoundError, match=r"no CLIP in open_clip layout at .*features.init_args.folder"
    ):
        OpenClipFeatures(str(tmp_path), [0]).load()
    with pytest.raises(FileNotFoundError, match=r"no transformers model at .*features.init_args.folder"):
        Dinov2Features(str(tmp_path), [0]).load()
