"""Decoding, resizing, and what is drawn for each visit."""

import io
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from data.shards import images
from data.shards.datamodule import ShardDataModule
from data.shards.decoders import decode
from data.shards.images import (
    Fitting,
    UndecodableImageError,
    decode_deep_grey,
    decode_pil,
    decode_pixels,
    fast_jpeg_decoder,
    fit,
    image_size,
)
from data.shards.order.sample_order import Draw, draw
from data.shards.writer import ShardWriter
from sdxs_lightning.core import image_formats


def smooth(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    small = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return np.array(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def jpeg(pixels: NDArray[np.uint8], mode: str = "RGB", **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(stream, "JPEG", quality=90, **options)
    return stream.getvalue()


CASES: list[tuple[str, dict[str, Any]]] = [
    ("RGB", {}),
    ("RGB", {"subsampling": 0}),
    ("RGB", {"progressive": True}),
    ("L", {}),
    ("CMYK", {}),
]


@pytest.mark.parametrize(("mode", "options"), CASES)
def test_the_fast_decoder_gives_the_pixels_of_pil(mode: str, options: dict[str, Any]) -> None:
    assert fast_jpeg_decoder() is not None
    content = jpeg(smooth(70, 51), mode, **options)
    with Image.open(io.BytesIO(content)) as opened:
        expected = np.array(opened.convert("RGB"))
    assert np.array_equal(decode_pixels(content), expected)
    assert np.array_equal(decode("jpg", memoryview(content), "here"), expected)
    for cut in [*range(0, len(content), 97), len(content) - 2, len(content) - 1]:
        with pytest.raises(UndecodableImageError):
            decode_pixels(content[:cut])


def test_without_the_fast_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    content = jpeg(smooth(40, 40))
    expected = decode_pixels(content)
    monkeypatch.setattr(images, "fast_jpeg_decoder", lambda: None)
    assert np.array_equal(images.decode_pixels(content), expected)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("value", range(10))
def test_the_orientation_of_cameras_is_applied(value: int, kind: str) -> None:
    pixels, exif, stream = smooth(30, 50), Image.Exif(), io.BytesIO()
    exif[0x0112] = value
    options = {"lossless": True} if kind == "WEBP" else {}
    Image.fromarray(pixels).save(stream, kind, exif=exif.tobytes(), **options)
    content = stream.getvalue()
    with Image.open(io.BytesIO(content)) as opened:
        expected = np.array(ImageOps.exif_transpose(opened).convert("RGB"))
        stored = np.array(opened.convert("RGB"))
    if value in (5, 6, 7, 8):
        assert expected.shape == (50, 30, 3)
    assert np.array_equal(decode_pixels(content), expected)
    assert np.array_equal(np.array(decode_pil(content)), expected)
    assert np.array_equal(np.array(decode_pil(content, upright=False)), stored)
    assert image_size(content) == expected.shape[:2]


@pytest.mark.parametrize("kind", ["TIFF", "PNG"])
@pytest.mark.parametrize("value", range(1, 9))
def test_the_orientation_is_applied_once_to_tiff_and_to_deep_grey(value: int, kind: str) -> None:
    """PIL turns a TIFF while it loads it, and reports the turned size before."""
    exif = Image.Exif()
    exif[0x0112] = value
    stored = np.arange(15, dtype=np.uint16).reshape(3, 5) * 257
    turned = (
        stored,
        stored[:, ::-1],
        stored[::-1, ::-1],
        stored[::-1],
        stored.T,
        stored[::-1].T,
        stored[::-1, ::-1].T,
        stored[:, ::-1].T,
    )[value - 1]  # Exif 2.32, table 6
    for pixels in (stored, (stored >> 8).astype(np.uint8)):
        stream = io.BytesIO()
        options: dict[str, Any] = {"tiffinfo": {0x0112: value}} if kind == "TIFF" else {"exif": exif}
        Image.fromarray(pixels).save(stream, kind, **options)
        content = stream.getvalue()
        for found in (decode_pixels(content), np.asarray(decode_pil(content))):
            np.testing.assert_array_equal(found[:, :, 0], turned >> 8)
        assert image_size(content) == turned.shape
        deep = decode_deep_grey(content)
        assert (deep is None) == (pixels is not stored)
        if deep is not None:
            np.testing.assert_array_equal(deep[:, :, 0], turned)


def test_damaged_exif_is_ignored_as_by_any_viewer() -> None:
    content = jpeg(smooth(30, 50), exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01" * 30)
    assert decode_pixels(content).shape == (30, 50, 3) and image_size(content) == (30, 50)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_and_not_clipped(kind: str) -> None:
    """Depth maps come so. 16-bit colour is read the same way: OpenCV, libpng and Pillow keep the upper 8 bits."""
    values, stream = np.array([[0, 0x4000, 0x80FF, 0xFFFF]], dtype=np.uint16), io.BytesIO()
    Image.fromarray(values).save(stream, kind)
    assert decode_pixels(stream.getvalue()).tolist() == [[[0] * 3, [64] * 3, [128] * 3, [255] * 3]]
    assert np.array_equal(np.array(decode_pil(stream.getvalue())), decode_pixels(stream.getvalue()))
    coloured = cv2.imencode(f".{kind.lower()}", np.repeat(values[:, :, None], 3, axis=2))[1].tobytes()
    if kind == "PNG":
        assert np.array_equal(decode_pixels(coloured), decode_pixels(stream.getvalue()))


def test_grey_of_32_bits_is_refused() -> None:
    for mode in ("I", "F"):
        stream = io.BytesIO()
        Image.new(mode, (3, 3), 7).save(stream, "TIFF")
        with pytest.raises(UndecodableImageError, match="32-bit numbers .* store 8 or 16 bits"):
            decode_pixels(stream.getvalue())


def test_only_formats_of_images_are_opened() -> None:
    stream = io.BytesIO()
    Image.new("RGB", (3, 3)).save(stream, "EPS")
    with pytest.raises(UndecodableImageError, match="it is no file of JPEG, PNG, WEBP"):
        decode_pixels(stream.getvalue())


@pytest.mark.parametrize("rows", [1, 5, 1000])
def test_transparency_is_composed_in_strips(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 4), dtype=np.uint8)
    rgba, palette = io.BytesIO(), io.BytesIO()
    Image.fromarray(pixels).save(rgba, "PNG")
    Image.fromarray(pixels[..., :3]).quantize(16).save(palette, "PNG", transparency=3)
    monkeypatch.setattr(image_formats, "_STRIP_PIXELS", rows * 30)
    white = Image.new("RGBA", (30, 40), "white")
    for stream in (rgba, palette):
        with Image.open(stream) as opened:
            expected = Image.alpha_composite(white, opened.convert("RGBA")).convert("RGB")
        assert np.array_equal(decode_pixels(stream.getvalue()), np.array(expected))


def test_a_jpeg_that_ends_in_zeros_was_cut() -> None:
    """As a preallocated download leaves it; decoders take zeros for data and give a grey lower half."""
    content = jpeg(smooth(200, 200))
    half = len(content) // 2
    for cut in (half, len(content) - 40, len(content) - 3):
        with pytest.raises(UndecodableImageError, match="it ends in zeros|broken or was cut"):
            decode_pixels(content[:cut] + bytes(len(content) - cut))
    assert np.array_equal(decode_pixels(content + bytes(100)), decode_pixels(content))


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("end", ["zeros", "a hole"])
def test_a_png_with_a_part_of_zeros_was_cut(bits: int, end: str) -> None:
    """PIL decodes a PNG to look for EXIF behind its pixels, and only the first time says what is wrong with them."""
    stream = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 1 << bits, (64, 64, 3)[: 3 if bits == 8 else 2])
    Image.fromarray(pixels.astype(np.uint8 if bits == 8 else np.uint16)).save(stream, "PNG")
    content, half = stream.getvalue(), stream.tell() // 2
    cut = content[:half] + bytes(half if end == "zeros" else 512)
    for decoder in (decode_pixels, decode_pil, decode_deep_grey):
        if decoder is decode_deep_grey and bits == 8:
            continue  # it leaves such an image to the others
        with pytest.raises(UndecodableImageError, match="broken|truncated"):
            decoder((cut + content[len(cut) :])[: len(content)])


def test_elongated_images_are_not_blown_up() -> None:
    stream = io.BytesIO()
    Image.new("RGB", (60_000, 1)).save(stream, "PNG")
    with pytest.raises(UndecodableImageError, match=r"resized to 30720000 x 512, more than 100,000,000"):
        fit(decode_pixels(stream.getvalue()), (512, 512), Fitting(), 0)


@pytest.mark.parametrize("size", [(60, 90), (40, 40), (20, 64), (99, 150)])
def test_resizing_is_that_of_pil(size: tuple[int, int]) -> None:
    pixels = smooth(120, 180)
    fitted = fit(pixels, size, Fitting(), 0)
    scale = max(size[0] / 120, size[1] / 180)
    height, width = max(size[0], round(120 * scale)), max(size[1], round(180 * scale))
    resized = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    expected = np.array(resized)[top : top + size[0], left : left + size[1]]
    assert fitted.pixels.shape == (*size, 3) and fitted.original_size == (120, 180)
    assert fitted.crop == (top, left)
    assert np.abs(fitted.pixels.astype(int) - expected.astype(int)).max() <= 1


def test_random_crops_and_mirroring() -> None:
    pixels = np.arange(40 * 60 * 3, dtype=np.uint32).reshape(40, 60, 3).astype(np.uint8)
    pixels[..., 0] = np.arange(60)
    fitting = Fitting(seed=4, random_crop=True, flip=True)
    seen = [fit(pixels, (40, 40), fitting, position) for position in range(300)]
    lefts = [fitted.crop[1] for fitted in seen]
    assert {fitted.crop[0] for fitted in seen} == {0} and set(lefts) == set(range(21))
    mirrored = [bool(fitted.pixels[0, 0, 0] > fitted.pixels[0, 1, 0]) for fitted in seen]
    assert 110 < sum(mirrored) < 190
    assert abs(np.corrcoef(lefts, mirrored)[0, 1]) < 0.2
    for fitted, flipped in zip(seen, mirrored, strict=True):
        # The crop counts in the image as it was mirrored.
        first = 59 - fitted.crop[1] if flipped else fitted.crop[1]
        assert fitted.pixels[0, 0, 0] == first
    again = fit(pixels, (40, 40), fitting, 7)
    assert np.array_equal(again.pixels, seen[7].pixels) and again.crop == seen[7].crop
    assert [fit(pixels, (40, 40), Fitting(5, True), p).crop for p in range(300)] != [f.crop for f in seen]


def test_draws_are_uniform_and_apart() -> None:
    drawn = np.array([[draw(1, position, what, 5) for what in Draw] for position in range(4000)])
    for column in drawn.T:
        counts = np.bincount(column, minlength=5)
        assert ((counts - 800) ** 2 / 800).sum() < 18.5  # 4 degrees of freedom, p = 0.001
    assert np.abs(np.corrcoef(drawn.T) - np.eye(len(Draw))).max() < 0.06


def test_one_of_several_captions(tmp_path: Path) -> None:
    with ShardWriter(tmp_path) as writer:
        fields = {"caption": "web", "long": ["first", "second", " "]}
        writer.write({"json": fields, "txt": "not this"})
        writer.write({"json": {"caption": "only"}, "txt": "not this"})
    data = ShardDataModule(
        str(tmp_path), 2, contents=[], caption_fields=["caption", "long"], shuffle_window_shards=0
    )
    data.setup()
    assert data.dataset is not None
    captions = data.dataset.batch(range(600)).captions
    counts = {caption: captions.count(caption) for caption in set(captions)}
    assert counts.pop("only") == 300 and set(counts) == {"web", "first", "second"}
    assert min(counts.values()) > 70
    assert data.dataset.batch([8]).captions == [captions[8]]
    bad = ShardDataModule(str(tmp_path), 2, contents=[], caption_fields=["nothing"])
    bad.setup()
    assert bad.dataset is not None
    with pytest.raises(ValueError, match="the caption is empty"):
        bad.dataset.batch([0])


def test_a_control_image_is_cropped_as_its_image(tmp_path: Path) -> None:
    pixels = smooth(40, 70)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    with ShardWriter(tmp_path) as writer:
        writer.write(
            {"png": stream.getvalue(), "cond.png": stream.getvalue(), "json": json.dumps({"caption": "a"})}
        )
    data = ShardDataModule(
        str(tmp_path), 1, contents=["images", "control_images"], resolution=32, crop="random", flip=True
    )
    data.setup()
    assert data.dataset is not None
    crops = set()
    for position in range(20):
        batch = data.dataset.batch([position])
        assert batch.images is not None and batch.control_images is not None and batch.crops is not None
        assert torch.allclose(batch.images / 2 + 0.5, batch.control_images, atol=1e-6)
        crops.add(tuple(batch.crops[0].tolist()))
    assert len(crops) > 8


@pytest.mark.parametrize("contents", [["images", "sizes"], ["sizes", "images"]])
def test_an_image_resized_before_keeps_its_first_size_and_both_crops(tmp_path: Path, contents: Any) -> None:
    """Of a 100x96 image, halved and cropped at (5, 0) to 40x48, the reader makes 20x20."""
    fields = {"original_height": 100, "original_width": 96, "crop_top": 5, "crop_left": 0}
    with ShardWriter(tmp_path) as writer:
        writer.write({"jpg": jpeg(smooth(40, 48)), "txt": "an image", "json": fields})
    data = ShardDataModule(str(tmp_path), 1, contents=contents, resolution=20)
    (batch,) = iter(data.train_dataloader())
    assert batch.images is not None and batch.images.shape == (1, 3, 20, 20)
    assert batch.original_sizes is not None and batch.original_sizes.tolist() == [[100, 96]]
    # 40x48 becomes 20x24, of which the middle 20 columns stay: (round(5 / 2), 0 + 2).
    assert batch.crops is not None and batch.crops.tolist() == [[2, 2]]
