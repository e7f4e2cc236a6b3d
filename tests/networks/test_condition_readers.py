"""Diffusion of the images that a condition reader is trained on, and reads in the student's loss."""

from __future__ import annotations

import pytest
import torch

from sdxs_lightning.core.seeding import Stream, uniform
from sdxs_lightning.families.network_types import UNet2DConditionModel
from sdxs_lightning.networks.condition_readers import diffused
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
