"""Whether a base listens to original size and crop."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import avg_pool2d, interpolate

from data.toy.rendered import render_batch
from evaluation.benchmarks.size_conditioning import draw, main, sharpness
from evaluation.protocols.protocols import get_protocol
from sdxs_lightning.families.sdxl import StableDiffusionXL
from sdxs_lightning.networks.denoiser import Denoiser
from sdxs_lightning.pairs.target_sampler import TargetSampler
from tests.helpers.tiny import save_tiny_sd, save_tiny_sdxl


def test_sharpness_falls_with_the_original_size() -> None:
    pictures = render_batch("val", 20, 0)
    half = interpolate(avg_pool2d(pictures.float(), 2), size=32, mode="bilinear")
    assert sharpness(half.round().to(torch.uint8)) < 0.9 * sharpness(pictures)
    steps = torch.tensor([0, 4, 4, 0], dtype=torch.uint8).expand(1, 3, 4, 4)
    assert sharpness(steps) == pytest.approx((8 / 3 + 0) / 2)


def test_what_is_told_reaches_the_network_and_the_rest_is_equal(tmp_path: Path) -> None:
    family = StableDiffusionXL(str(save_tiny_sdxl(tmp_path / "sdxl")))
    denoiser = Denoiser(family.load_unet(), family.schedule, family.prediction_type)
    protocol = get_protocol("toy", samples=3)
    arguments = family, TargetSampler(denoiser, 2, 1.5), protocol
    plain = draw(*arguments, 2, 32, 0, told="plain")
    assert plain.shape == (3, 3, 32, 32) and plain.dtype == torch.uint8
    assert torch.equal(plain, draw(*arguments, 2, 32, 0, told="plain"))
    for size, crop in ((16, 0), (32, 8)):
        assert not torch.equal(plain, draw(*arguments, 2, size, crop, told="other"))


def test_a_missing_base_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="size_conditioning: .*nowhere"):
        main(["--base", str(tmp_path / "nowhere")])


def test_a_base_without_size_conditioning_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="size_conditioning: .*is not conditioned on sizes"):
        main(["--base", str(save_tiny_sd(tmp_path / "sd"))])
