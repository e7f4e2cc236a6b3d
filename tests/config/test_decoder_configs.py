"""The decoder's YAML files: two updates of each at tiny size, and their networks at full size without weights."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from diffusers import AutoencoderTiny

from sdxs_lightning.cli import main
from sdxs_lightning.config_files import read_arguments
from sdxs_lightning.networks.image_features import FeatureNetwork, _Intermediates
from sdxs_lightning.networks.projected_discriminator import ProjectedDiscriminator
from sdxs_lightning.networks.tiny_decoder import DecoderTopology, TinyDecoder
from tests.helpers.tiny_decoding import save_dinov2
from tests.helpers.tiny_distillation import save_base, save_shards
from tests.helpers.tiny_run import ROOT, write_config

NAMES = ("toy", "sd15", "sd21", "sdxl")
FULL_SIZE = NAMES[1:]


def overlay(name: str, folder: Path) -> dict[str, Any]:
    """What makes a file tiny: its base, its features' weights, widths and counts."""
    model: dict[str, Any] = {
        "family": {
            "init_args": {"base": str(save_base("sdxl-epsilon" if name == "sdxl" else "sd-epsilon", folder))}
        },
        "decoder": {
            "init_args": {
                "topology": {"block_out_channels": [8, 8], "num_decoder_blocks": [1, 1]},
                "lr_scheduler": {"init_args": {"fall_updates": 1}},
            }
        },
        "max_student_updates": 2,
        "adversarial": {"l1_only_share": 0.5, "crop_px": 24},
    }
    data: dict[str, Any] = {"batch_size": 2, "num_workers": 0}
    if name == "toy":
        data |= {"train_images": 64, "cache": str(folder / "rendered")}
    else:
        data |= {"shards": str(save_shards(folder / "shards"))}
        model["sampler"] = {"steps": 2}
        model["features"] = {
            "class_path": "sdxs_lightning.networks.image_features.Dinov2Features",
            "init_args": {"folder": str(save_dinov2(folder / "dinov2")), "layers": [0, 1], "size_px": 32},
        }
    trainer = {"default_root_dir": str(folder / f"{name}-decoder"), "enable_model_summary": False}
    return {"model": {"init_args": model}, "data": {"init_args": data}, "trainer": trainer}


@pytest.mark.parametrize("name", NAMES)
def test_two_updates_at_tiny_size(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp()
    changes = write_config(folder / f"{name}-tiny-decoder.yaml", overlay(name, folder))
    files = [ROOT / "configs" / name / "decoder.yaml", ROOT / "configs/hardware/cpu.yaml", changes]
    assert main([part for file in files for part in ("--config", str(file))]) == 0
    exported = AutoencoderTiny.from_pretrained(folder / f"{name}-decoder" / "decoder")
    assert exported.config.decoder_block_out_channels == [8, 8]
    assert all(parameter.isfinite().all() for parameter in exported.decoder.parameters())
    checkpoint = next((folder / f"{name}-decoder" / "checkpoints").iterdir())
    state = torch.load(checkpoint / "state.ckpt", weights_only=True)
    assert state["iterations"] == 2
    assert state["optimizer_states"][1]["state"], "the second update has the GAN"


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_without_weights(name: str) -> None:
    arguments = ["--config", str(ROOT / "configs" / name / "decoder.yaml")]
    settings = read_arguments(arguments).settings["model"]["init_args"]
    topology = settings["decoder"]["init_args"]["topology"]
    features, adversarial = settings["features"]["init_args"], settings["adversarial"]
    sgd = partial(torch.optim.SGD, lr=0.1)
    with torch.device("meta"):
        decoder = TinyDecoder(sgd, topology=DecoderTopology(**{k: _tuple(v) for k, v in topology.items()}))
        decoder.build(latent_channels=4, vae_factor=8)
        vit = timm.create_model(features["name"], pretrained=False, **features["arguments"])
        network = FeatureNetwork(
            _Intermediates(vit, features["layers"]), (0.5,) * 3, (0.5,) * 3, features["size_px"]
        )
        shapes = network.shapes(adversarial["crop_px"])
        discriminator = ProjectedDiscriminator(sgd)
        discriminator.build(shapes)
        images = decoder(torch.empty(2, 4, 64, 64))
        logits = discriminator(network(images))
    assert sum(parameter.numel() for parameter in decoder.parameters()) == 1_222_531
    assert images.shape == (2, 3, 512, 512)
    assert shapes == [(384, 16, 16)] * 4 and [part.shape for part in logits] == [(2, 256)] * 4
    assert Path(features["checkpoint"]).suffix == ".safetensors"


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
