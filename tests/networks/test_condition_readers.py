"""Diffusion of the images that a condition reader is trained on, and reads in the student's loss."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdxs_lightning.core.seeding import Stream, uniform
from sdxs_lightning.families.network_types import UNet2DConditionModel
from sdxs_lightning.networks.condition_readers import ReaderNetwork, diffused
from sdxs_lightning.networks.controlnet import StemInit, controlnet_from_unet
from tests.helpers.tiny import tiny_sd_unet


def test_diffused_keeps_the_variance_and_has_a_level_for_each_image() -> None:
    positions = torch.arange(64)
    images = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = diffused(images, 0.9, 7, positions)
    sigma = 0.9 * uniform(7, Stream.READER_NOISE_STRENGTH, positions)
    assert found.var().item() == pytest.approx(1, abs=0.02)
    # The regression of the result on the image is sqrt(1 - sigma^2), of each image its own.
    share = (found * images).mean(dim=(1, 2, 3)) / images.square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(share, (1 - sigma**2).sqrt(), atol=0.08, rtol=0)
    assert sigma.min() < 0.1 and sigma.max() > 0.8
    assert torch.equal(
        diffused(images[5:7], 0.9, 7, positions[5:7]), found[5:7]
    )  # however the batch is split
    assert torch.equal(diffused(images, 0.0, 7, positions), images)


@pytest.mark.parametrize(("stem_init", "bounds"), [("zero", (0.0, 0.0)), ("he", (0.1, 3.0))])
def test_a_stem_by_he_shows_the_condition_to_the_encoder(
    stem_init: StemInit, bounds: tuple[float, float]
) -> None:
    unet: UNet2DConditionModel = tiny_sd_unet()
    controlnet = controlnet_from_unet(unet, (16, 32, 96, 256), stem_init=stem_init)
    conditions = (torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(1)) > 0.5).float()
    with torch.no_grad():
        embedded = controlnet.controlnet_cond_embedding(conditions)
    varying = (embedded - embedded.mean(dim=0)).std().item()
    latents = (
        controlnet.conv_in(torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(2))).std().item()
    )
    assert bounds[0] <= varying / latents <= bounds[1]
    # The residuals start at zero with either.
    assert all(one.weight.count_nonzero() == 0 for one in controlnet.controlnet_down_blocks)


def _with_nan(weights: Path) -> None:
    tensors = load_file(weights)
    save_file(tensors | {"whole.bias": tensors["whole.bias"] * float("nan")}, weights)


def _config(**changes: object) -> Callable[[Path], None]:
    def write(weights: Path) -> None:
        (weights.parent / "config.json").write_text(json.dumps(changes))

    return write


@pytest.mark.parametrize(
    ("breaks", "message"),
    [
        (lambda weights: weights.write_bytes(weights.read_bytes()[:-50]), "is cut off, or does not fit"),
        (_with_nan, "has NaN or infinity in whole.bias"),
        (_config(), "has no channels and widths of a condition reader"),
        (_config(channels="3", widths=[4, 8]), "has no channels and widths of a condition reader"),
        (_config(channels=3, widths=[]), r"needs channels and widths of 1 or more, .* widths \[\]"),
        (_config(channels=3, widths=[4, -8]), "needs channels and widths of 1 or more"),
        (_config(channels=3, widths=[4, 4]), "is cut off, or does not fit its config.json"),
    ],
)
def test_a_broken_reader_is_refused_in_a_sentence(
    tmp_path: Path, breaks: Callable[[Path], object], message: str
) -> None:
    ReaderNetwork(widths=(4, 8)).save_pretrained(tmp_path)
    assert ReaderNetwork.from_pretrained(tmp_path).widths == (4, 8)
    breaks(tmp_path / "condition_reader.safetensors")
    with pytest.raises(ValueError, match=message):
        ReaderNetwork.from_pretrained(tmp_path)


def test_a_reader_reads_any_size_of_which_more_than_a_pixel_is_left() -> None:
    reader = ReaderNetwork(widths=(4, 4, 4))
    assert reader(torch.zeros(1, 3, 9, 14)).shape == (1, 3, 9, 14)
    with pytest.raises(ValueError, match="of 3 widths reads images from 8 pixels on, got 7x14"):
        reader(torch.zeros(1, 3, 7, 14))
