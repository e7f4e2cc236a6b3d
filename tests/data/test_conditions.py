"""Condition images: against definitions, against the real classes of transformers, and through the DataModule."""

from __future__ import annotations

import io
import pickle
import shutil
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser, set_parsing_settings
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from transformers import (
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    DPTImageProcessor,
)

from data.conditions import Canny, Depth, ImageCondition, Sketch, SoftEdge
from data.shards.datamodule import ShardDataModule
from data.shards.writer import ShardWriter
from data.toy.background_bar import BackgroundBar
from sdxs_lightning.core.errors import UserError
from sdxs_lightning.core.image_condition import description_of
from sdxs_lightning.core.latents import from_uint8
from sdxs_lightning.networks.condition_readers import DepthReader

FILTERS = [Canny(), SoftEdge(), Sketch()]


def square(size: int = 40) -> NDArray[np.uint8]:
    """A bright square on dark ground."""
    image = np.full((size, size + 8, 3), 30, dtype=np.uint8)
    image[10:30, 12:32] = (220, 180, 200)
    return image


@pytest.fixture(scope="module")
def depth_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Depth Anything of tiny size with random weights."""
    folder = tmp_path_factory.mktemp("depth")
    torch.manual_seed(0)
    backbone = Dinov2Config(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        out_features=["stage1", "stage2"],
        reshape_hidden_states=False,
    )
    config = DepthAnythingConfig(
        backbone_config=backbone,
        patch_size=14,
        reassemble_hidden_size=16,
        reassemble_factors=[1, 0.5],
        neck_hidden_sizes=[8, 8],
        fusion_hidden_size=8,
        head_in_channels=8,
        head_hidden_size=4,
    )
    DepthAnythingForDepthEstimation(config).save_pretrained(folder, safe_serialization=True)
    DPTImageProcessor(size={"height": 56, "width": 56}).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("condition", FILTERS, ids=lambda one: type(one).__name__)
def test_every_filter(condition: ImageCondition) -> None:
    image = square()
    made = condition(image)
    assert made.shape == image.shape and made.dtype == np.uint8
    assert (made[:, :, 0] == made[:, :, 1]).all() and (made[:, :, 0] == made[:, :, 2]).all()
    # The same bytes each time, also by a copy that went to another process and for an image that is a view.
    assert np.array_equal(made, condition(image)) and np.array_equal(square(), image)
    assert np.array_equal(made, pickle.loads(pickle.dumps(condition))(image))
    assert np.array_equal(made, condition(np.asfortranarray(image)))
    # Edges are white, and only at edges.
    assert made.max() > 200 and made[20, 22].max() == 0 and made[2:5, 2:5].max() == 0
    assert made[8:13, 22].max() > 100 or made[8:13, 22].max() == made.max()
    assert condition(np.full((16, 16, 3), 77, dtype=np.uint8)).max() == 0


def test_canny_is_opencvs_and_by_its_thresholds() -> None:
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    assert np.array_equal(Canny()(image)[:, :, 0], cv2.Canny(image, 100, 200))
    assert np.array_equal(Canny(10, 700)(image)[:, :, 0], cv2.Canny(image, 10, 700))
    assert Canny(0, 10)(image).mean() > Canny(800, 1500)(image).mean()
    with pytest.raises(ValueError, match="Canny needs 0 <= low <= high, got low 3 and high 2"):
        Canny(3, 2)
    with pytest.raises(ValueError, match="high inf"):  # all images would be black
        Canny(3, float("inf"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="vary from 0 to 100, got inf"):
        Canny(vary=float("inf"))


def test_soft_edges_are_scharrs_gradient_of_the_blurred_image() -> None:
    image = square()
    smooth = ndimage.gaussian_filter(image.astype(float), (1.5, 1.5, 0), truncate=4, mode="mirror")
    kernel = np.array([[-3, 0, 3], [-10, 0, 10], [-3, 0, 3]], dtype=float)
    across = np.stack([ndimage.correlate(smooth[..., i], kernel, mode="mirror") for i in range(3)], -1)
    down = np.stack([ndimage.correlate(smooth[..., i], kernel.T, mode="mirror") for i in range(3)], -1)
    strength = np.hypot(across, down).max(axis=-1)
    expected = np.clip(strength / np.percentile(strength, 99), 0, 1) * 255
    assert np.abs(SoftEdge(1.5)(image)[:, :, 0] - expected).max() < 3
    # Twice the contrast, the same edges.
    faint = (image.astype(int) // 2).astype(np.uint8)
    assert np.abs(SoftEdge()(faint).astype(int) - SoftEdge()(image)).max() <= 2
    with pytest.raises(ValueError, match="SoftEdge needs a blur above 0 pixels and up to 1000, got 0"):
        SoftEdge(0)
    with pytest.raises(ValueError, match="up to 1000, got inf"):
        SoftEdge(float("inf"))


def test_a_sketch_draws_the_dark_side_of_edges_only() -> None:
    drawn = Sketch()(square())[:, :, 0]
    assert drawn[9, 22] == drawn.max() > 200 and drawn[11, 22] == 0  # outside, on the dark ground
    assert Sketch(threshold=-100.0)(square()).max() == 0
    with pytest.raises(ValueError, match="Sketch needs a blur above 0 pixels and up to 1000, got -1"):
        Sketch(blur=-1)
    for name in ("sharpness", "threshold"):
        with pytest.raises(ValueError, match=f"Sketch needs a finite {name}, got nan"):
            Sketch(**{name: float("nan")})


def test_depth_is_the_networks(depth_folder: Path) -> None:
    image = np.random.default_rng(1).integers(0, 256, (30, 44, 3), dtype=np.uint8)
    condition = Depth(str(depth_folder))
    network = DepthAnythingForDepthEstimation.from_pretrained(depth_folder).eval()
    resized = Image.fromarray(image).resize((56, 56), Image.Resampling.BICUBIC)
    # DPT's processor scales to [0, 1] and normalises by a mean and deviation of one half.
    pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        predicted = network(pixels).predicted_depth[:, None]
    expected = torch.nn.functional.interpolate(predicted, (30, 44), mode="bicubic")[0, 0].numpy()
    found = condition.depth(image)
    assert found.shape == (30, 44)
    assert np.abs(found - expected).max() < 0.05 * np.ptp(expected)
    made = condition(image)
    assert (made.min(), made.max(), made.shape) == (0, 255, image.shape)
    assert np.unravel_index(made[:, :, 0].argmax(), (30, 44)) == np.unravel_index(found.argmax(), (30, 44))
    farther = Depth(str(depth_folder), metric=True)(image)
    assert np.abs(farther.astype(int) + made - 255).max() <= 1
    # The network stays behind: each process loads its own.
    sent = pickle.dumps(condition)
    assert len(sent) < 500 and np.array_equal(pickle.loads(sent)(image), made)


@pytest.mark.parametrize("size", [(56, 56), (48, 64), (224, 160)])
@pytest.mark.parametrize("keep_aspect_ratio", [False, True])
def test_the_depth_reader_reads_what_the_condition_has(
    depth_folder: Path, tmp_path: Path, size: tuple[int, int], keep_aspect_ratio: bool
) -> None:
    folder = Path(shutil.copytree(depth_folder, tmp_path / "depth"))
    processor = DPTImageProcessor(
        size={"height": 70, "width": 70}, keep_aspect_ratio=keep_aspect_ratio, ensure_multiple_of=14
    )
    processor.save_pretrained(folder)
    coarse = np.random.default_rng(0).integers(0, 256, (2, size[0] // 8, size[1] // 8, 3))
    frames = coarse.repeat(8, 1).repeat(8, 2).astype(np.uint8)
    images = from_uint8(torch.from_numpy(frames).permute(0, 3, 1, 2)).requires_grad_()
    for metric in (False, True):
        made = np.stack([Depth(str(folder), metric=metric)(frame) for frame in frames])
        read = DepthReader(str(folder), metric).load()(images)
        expected = torch.from_numpy(made).permute(0, 3, 1, 2).float() / 255
        assert expected.std() > 0.1
        assert (read - expected).abs().max() < 4.5 / 255  # the processor resizes bytes
    (gradient,) = torch.autograd.grad(read.square().mean(), images)
    assert gradient.isfinite().all() and gradient.abs().max() > 0


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        ("nowhere", UserError, "Depth: there is no folder 'nowhere'; give a folder with config.json"),
        ("EMPTY", ValueError, "cannot be loaded as a depth network of transformers"),
    ],
)
def test_what_is_no_depth_network(tmp_path: Path, model: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Depth(str(tmp_path) if model == "EMPTY" else model)(square())


def images(folder: Path) -> Path:
    with ShardWriter(folder) as writer:
        for i in range(4):
            stream = io.BytesIO()
            Image.fromarray(np.roll(square(), 3 * i, axis=1)).save(stream, "PNG")
            writer.write({"png": stream.getvalue(), "txt": f"square {i}"})
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_the_data_module_makes_them_while_reading(tmp_path: Path, workers: int) -> None:
    data = ShardDataModule(
        str(images(tmp_path / "set")),
        2,
        contents=["images", "control_images"],
        resolution=32,
        num_workers=workers,
        condition=SoftEdge(),
    )
    batches = list(data.train_dataloader())
    data.teardown()
    assert len(batches) == 2
    for batch in batches:
        assert batch.images is not None and batch.control_images is not None
        pixels = ((batch.images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        expected = np.stack([SoftEdge()(image) for image in pixels])
        found = (batch.control_images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        assert np.array_equal(found, expected)


class Negative:
    """One of your own."""

    def __init__(self, ground: int = 255) -> None:
        self.ground = ground

    def __call__(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """See `ImageCondition`."""
        return (self.ground - image).astype(np.uint8)


@pytest.mark.parametrize(
    ("path", "arguments", "expected"),
    [
        ("data.conditions.Canny", {"low": 50}, Canny(50)),
        ("data.conditions.Sketch", {}, Sketch()),
        ("data.conditions.Depth", {"model": "somewhere"}, Depth("somewhere")),
        (f"{__name__}.Negative", {"ground": 200}, Negative(200)),
    ],
)
def test_yaml_names_them_by_class_path(
    path: str, arguments: dict[str, object], expected: ImageCondition
) -> None:
    # As `--trust` does: jsonargparse's settings are those of the process, and another test may have limited them.
    set_parsing_settings(import_path_allowlist=["data", "sdxs_lightning", __name__])
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(ShardDataModule, "data", instantiate=False)
    config = parser.parse_object(
        {"data": {"shards": "x", "batch_size": 1, "condition": {"class_path": path, "init_args": arguments}}}
    )
    condition = parser.instantiate(config).data.condition
    assert type(condition) is type(expected) and vars(condition) == vars(expected)


def test_thresholds_of_canny_vary_with_the_image_and_only_with_it() -> None:
    generator = np.random.default_rng(0)
    soft: list[NDArray[np.uint8]] = [
        np.asarray(
            cv2.GaussianBlur(generator.integers(0, 256, (24, 24, 3), np.uint8), (0, 0), 2.0), dtype=np.uint8
        )
        for _ in range(24)
    ]
    plain, varied = Canny(30, 60), Canny(30, 60, vary=1.0)
    counts = [(plain(one).sum(), varied(one).sum()) for one in soft]
    assert any(more > fixed for fixed, more in counts) and any(less < fixed for fixed, less in counts)
    assert all(np.array_equal(varied(one), pickle.loads(pickle.dumps(varied))(one)) for one in soft)
    assert all(np.array_equal(plain(one), Canny(30, 60, vary=0.0)(one)) for one in soft)
    with pytest.raises(ValueError, match=r"Canny needs a vary from 0 to 100, got -1"):
        Canny(vary=-1.0)


def deep_png(values: NDArray[np.uint16]) -> bytes:
    """A 16-bit grey PNG."""
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "PNG")
    return stream.getvalue()


def test_depth_maps_of_16_bits_keep_their_precision(tmp_path: Path) -> None:
    depth = (
        np.arange(0, 48 * 40, dtype=np.uint16).reshape(40, 48) * 3
    )  # millimetres: 9 % of the range of 16 bits
    image = io.BytesIO()
    Image.fromarray(square()).save(image, "PNG")
    with ShardWriter(tmp_path / "set") as writer:
        writer.write({"png": image.getvalue(), "cond.png": deep_png(depth), "txt": "words"})
    found = {}
    for resolution in (None, 20):
        data = ShardDataModule(
            str(tmp_path / "set"), 1, contents=["images", "control_images"], resolution=resolution
        )
        controls = next(iter(data.train_dataloader())).control_images
        assert controls is not None
        found[resolution] = controls
    expected = torch.from_numpy(depth.astype(np.float32)) / 65535
    torch.testing.assert_close(found[None][0], expected.expand(3, -1, -1), rtol=0, atol=1e-7)
    assert len(found[20].unique()) > 250  # of 400 pixels; 8 bits would leave 23 values
    assert abs(float(found[20].mean()) - float(expected[:, 4:44].mean())) < 1e-4


class Strokes:
    """A condition of one's own."""

    def __init__(self, widths: list[int], colour: str | None = None) -> None:
        self.widths, self.colour, self.found = widths, colour, object()

    def __call__(self, image: np.ndarray) -> np.ndarray:
        return image


@dataclass(frozen=True, slots=True)
class Lines:
    """One without a `__dict__`."""

    widths: tuple[int, ...]

    def __call__(self, image: np.ndarray) -> np.ndarray:
        return image


class Dots:
    """One whose settings are in slots."""

    __slots__ = ("device", "size")

    def __init__(self, size: int) -> None:
        self.size, self.device = size, "cpu"

    def __call__(self, image: np.ndarray) -> np.ndarray:
        return image


@pytest.mark.parametrize(
    ("condition", "description"),
    [
        (Strokes([1, 2]), "Strokes(widths=[1, 2], colour=None)"),
        (Strokes([1, 3], "red"), "Strokes(widths=[1, 3], colour='red')"),
        (Lines((1, 2)), "Lines(0=(1, 2))"),
        (Dots(3), "Dots(size=3)"),
        (SoftEdge(2.0), "SoftEdge(blur=2.0)"),
        (BackgroundBar(), "BackgroundBar()"),
    ],
)
def test_a_description_has_all_settings(condition: ImageCondition, description: str) -> None:
    assert description_of(condition) == description
