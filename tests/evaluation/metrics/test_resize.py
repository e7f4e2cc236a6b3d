"""Resizes: bit for bit those of Pillow, torchvision and TensorFlow 1."""

from __future__ import annotations

import cleanfid.resize
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x
from torchvision.transforms import CenterCrop, InterpolationMode, Resize

from evaluation.networks.resize import (
    FILTERS,
    Filter,
    centre_square,
    resize_bilinear_tf1,
    resize_by_pillows_arithmetic,
    resize_float,
    resize_shortest_and_crop,
    resize_uint8,
)


def noise(height: int, width: int, count: int = 2) -> Tensor:
    """Every byte as likely as any other: the hardest case for rounding."""
    generator = torch.Generator().manual_seed(height * width)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


def pil_images(images_uint8: Tensor) -> list[Image.Image]:
    return [Image.fromarray(array) for array in images_uint8.permute(0, 2, 3, 1).numpy()]


def tensor(images: list[Image.Image]) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)


@pytest.mark.parametrize("kind", list(FILTERS))
@pytest.mark.parametrize("size", [(24, 31), (150, 97), (64, 20)])
def test_pillows_arithmetic_gives_pillows_bytes(kind: Filter, size: tuple[int, int]) -> None:
    images = noise(64, 80)
    resampling = Image.Resampling[kind.upper()]
    expected = tensor([image.resize(size[::-1], resampling) for image in pil_images(images)])
    assert torch.equal(resize_by_pillows_arithmetic(images, size, kind), expected)
    assert torch.equal(resize_uint8(images, size, kind), expected)


@pytest.mark.parametrize("size", [(299, 299), (40, 50)])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_float_resize_is_that_of_clean_fid(size: tuple[int, int]) -> None:
    image = noise(128, 100, count=1)
    resize = cleanfid.resize.make_resizer("PIL", False, "bicubic", size[::-1])
    expected = torch.from_numpy(resize(image[0].permute(1, 2, 0).numpy())).permute(2, 0, 1)
    found = resize_float(image, size, "bicubic").clamp(0, 255)[0]
    assert (
        float((found - expected).abs().max()) < 1e-4
    )  # grey levels; torch's own interpolate is off by 0.009


@pytest.mark.parametrize("size", [(299, 299), (17, 50)])
def test_bilinear_of_tensorflow_1(size: tuple[int, int]) -> None:
    images = noise(64, 80).float()
    expected = interpolate_bilinear_2d_like_tensorflow1x(images, size=size, align_corners=False)
    assert torch.equal(resize_bilinear_tf1(images, size), expected)


@pytest.mark.parametrize("shape", [(64, 81), (97, 64), (32, 47), (20, 33)])
def test_shortest_side_and_crop_are_torchvisions(shape: tuple[int, int]) -> None:
    images = noise(*shape)
    resize, crop = Resize(32, InterpolationMode.BICUBIC), CenterCrop(32)
    expected = tensor([crop(resize(image)) for image in pil_images(images)])
    assert torch.equal(resize_shortest_and_crop(images, 32), expected)
    square = CenterCrop(min(shape))
    assert torch.equal(centre_square(images), tensor([square(image) for image in pil_images(images)]))


def test_the_right_size_is_left_alone() -> None:
    images = noise(32, 40)
    assert resize_uint8(images, (32, 40), "lanczos") is images
