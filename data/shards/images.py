"""Decoding, resizing, cropping and mirroring of images as arrays.

JPEG is decoded by OpenCV (libjpeg-turbo, directly into an array) if its version rejects truncated files as PIL does,
everything else by PIL; both give the same pixels. Resizing is bicubic with antialiasing; torch's kernel takes a fifth of the
time of PIL's and differs from it by at most 1 of 255.
"""

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from data.shards.order.sample_order import Draw, draw
from sdxs_lightning.core.errors import OneLineError
from sdxs_lightning.core.image_formats import FORMATS, as_rgb, readable_formats

MAX_PIXELS = 100_000_000
"""Limit on decoded images, since a file of a few kB can claim any size; 10,000 x 10,000 exceeds any training image."""

MAX_IMAGE_BYTES = 1 << 28
"""Maximum size of an image file, about that of an uncompressed image of MAX_PIXELS."""

SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif")
"""File extensions of FORMATS."""

OTHER_SUFFIXES = (
    ".heic", ".heif", ".jxl", ".jp2", ".j2k", ".ppm", ".pgm", ".pnm", ".tga", ".psd", ".svg", ".exr", ".hdr", ".ico", ".dds",
    ".raw", ".dng", ".apng", ".eps",
)  # fmt: skip
"""File extensions of unsupported image formats; folders with such files are refused rather than read without them."""

_ORIENTATION = 0x0112

_Depth = TypeVar("_Depth", np.uint8, np.uint16)
Bytes = bytes | memoryview
Pixels = NDArray[np.uint8]


class UndecodableImageError(OneLineError, ValueError):
    """Bytes that are not an image, or a truncated or too large one."""


@lru_cache(maxsize=1)
def fast_jpeg_decoder() -> Callable[[Bytes], Pixels | None] | None:
    """OpenCV's JPEG decoder, from bytes to (H, W, 3), or to None if they cannot be decoded.

    Returns None without OpenCV, or for versions (before 4.11) that may fill the rest of truncated files with grey. Imported on
    the first call; call it before workers are forked.
    """
    try:
        import cv2

        # As PIL does; the orientation is applied afterwards, in the same way for all formats.
        flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    except (ImportError, AttributeError):
        return None

    def decode(content: Bytes) -> Pixels | None:
        try:
            array: Any = cv2.imdecode(np.frombuffer(content, dtype=np.uint8), flags)
        except cv2.error:
            return None
        return None if array is None else np.asarray(array, dtype=np.uint8)

    stream = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(stream, "JPEG")
    return decode if decode(stream.getvalue()[:-40]) is None else None


def decode_pixels(content: Bytes) -> Pixels:
    """Decode an image completely to (H, W, 3), uint8 RGB.

    Transparency is composited over white and the EXIF orientation is applied. Of 16-bit channels, grey or colour, the upper 8
    bits are taken, and of several frames or pages the first.

    Raises:
        UndecodableImageError: if it cannot be decoded, or has more than MAX_PIXELS.
    """
    opened = open_image(content)
    decode = fast_jpeg_decoder() if opened.format == "JPEG" and opened.mode in ("RGB", "L") else None
    if decode is None:
        return np.array(_loaded(opened, upright=True))
    array = decode(content)
    if array is None:
        raise UndecodableImageError("its JPEG data is broken or was cut")
    if array.shape != (opened.height, opened.width, 3):
        raise UndecodableImageError(
            f"its header states {opened.width} x {opened.height} pixels, and it holds {array.shape[1]} x {array.shape[0]}"
        )
    return _upright(array, orientation(opened))


def decode_deep_grey(content: Bytes) -> NDArray[np.uint16] | None:
    """Decode 16-bit grey, such as a depth map, without loss of precision.

    Returns:
        (H, W, 3), uint16, three equal channels; None for other images, whose values `decode_pixels` returns.

    Raises:
        UndecodableImageError: as in `decode_pixels`.
    """
    opened = open_image(content)
    if not opened.mode.startswith("I;16"):
        return None
    try:
        opened.load()
        grey = np.asarray(opened).astype(np.uint16)
    except Exception as error:  # as in open_image
        raise UndecodableImageError(_reason(error)) from error
    grey = _upright(grey, orientation(opened))
    return np.repeat(grey[:, :, None], 3, axis=2)


def decode_pil(content: Bytes, upright: bool = True) -> Image.Image:
    """Like `decode_pixels`, always with PIL.

    Args:
        content: content of the file.
        upright: whether to apply the EXIF orientation; FID tools ignore it.
    """
    return _loaded(open_image(content), upright)


def open_image(content: Bytes) -> Image.Image:
    """Read the header of an image without decoding it.

    Raises:
        UndecodableImageError: for a format not in FORMATS, or a too large image or file.
    """
    if len(content) > MAX_IMAGE_BYTES:
        raise UndecodableImageError(
            f"its file has {len(content):,} bytes, more than {MAX_IMAGE_BYTES:,} (MAX_IMAGE_BYTES in data/shards/images.py)"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # MAX_PIXELS below is our own limit; damaged EXIF is ignored
            opened = Image.open(io.BytesIO(content), formats=readable_formats())
    except UnidentifiedImageError as error:
        raise UndecodableImageError(f"it is no file of {', '.join(FORMATS)}") from error
    except (
        Exception
    ) as error:  # Pillow's decoders raise many types for damaged files: struct.error, EOFError, KeyError, ...
        raise UndecodableImageError(_reason(error)) from error
    if opened.width * opened.height > MAX_PIXELS:
        raise UndecodableImageError(
            f"it has {opened.width} x {opened.height} pixels, more than {MAX_PIXELS:,} (MAX_PIXELS in data/shards/images.py)"
        )
    if (
        opened.format == "JPEG"
        and content[-1] == 0
        and not bytes(content).rstrip(b"\0").endswith(b"\xff\xd9")
    ):
        raise UndecodableImageError(
            "it ends in zeros instead of the mark that ends a JPEG: it was cut, and padded"
        )
    return opened


def orientation(opened: Image.Image) -> int:
    """EXIF orientation that is still to be undone, 1 (none) to 8; 1 if missing or damaged, and for TIFF, which PIL undoes.

    Of a PNG, PIL decodes the pixels for it, which may stand before its EXIF, and does so once: load an image first to see the
    error of one that is cut.
    """
    if opened.format == "TIFF":
        return 1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = opened.getexif().get(_ORIENTATION, 1)
    except Exception:  # ignored, as image viewers do
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def _upright(pixels: NDArray[_Depth], exif: int) -> NDArray[_Depth]:
    """Undo the rotation and mirroring of an EXIF orientation.

    Source: Exif 2.32, table 6: the visual top and left of the stored row 0 and column 0.
    """
    if exif >= 5:
        pixels = pixels.swapaxes(0, 1)
    if exif in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if exif in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _loaded(opened: Image.Image, upright: bool) -> Image.Image:
    """Load the image and convert it to RGB."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            opened.load()  # raises for a truncated JPEG instead of filling it with grey
        converted = as_rgb(opened)
    except Exception as error:  # as in open_image
        raise UndecodableImageError(_reason(error)) from error
    exif = orientation(opened) if upright else 1
    return converted if exif == 1 else Image.fromarray(_upright(np.asarray(converted), exif))


def _reason(error: Exception) -> str:
    return (
        str(error)
        if isinstance(error, OSError | ValueError) and str(error)
        else f"{type(error).__name__}: {error}"
    )


def image_size(content: Bytes) -> tuple[int, int]:
    """Height and width of an image after the EXIF orientation, from its header.

    Raises:
        UndecodableImageError: as in `decode_pixels`.
    """
    opened = open_image(content)
    size = opened.height, opened.width
    return size if orientation(opened) < 5 else size[::-1]


@dataclass(frozen=True)
class Fitting:
    """Crop and mirroring of images."""

    seed: int = 0
    random_crop: bool = False
    """Random crop at each visit instead of the centre crop."""
    flip: bool = False
    """Mirror images in half of the visits."""


@dataclass(frozen=True)
class FittedImage:
    """An image of its batch's size, with the size and crop it was made from."""

    pixels: NDArray[Any]
    """(H, W, 3), uint8, or uint16 for 16-bit conditions; may be a view of a channels-first array, the layout of batches."""
    original_size: tuple[int, int]
    """Height and width before resizing."""
    resized: tuple[int, int]
    """Height and width after resizing, before the crop."""
    crop: tuple[int, int]
    """Top and left of the crop in the resized (and mirrored) image."""

    @property
    def scale(self) -> tuple[float, float]:
        """Ratios of resized to stored height and width."""
        return self.resized[0] / self.original_size[0], self.resized[1] / self.original_size[1]


def fit(pixels: NDArray[Any], size: tuple[int, int] | None, fitting: Fitting, position: int) -> FittedImage:
    """Resize an image to cover a size, mirror it, and crop it to that size.

    Args:
        pixels: (H, W, 3), uint8 or uint16.
        size: height and width; None keeps the image's.
        fitting: crop and mirroring.
        position: position of the sample, which seeds the random draws.

    Raises:
        UndecodableImageError: for an image so elongated that it would have more than MAX_PIXELS after resizing.
    """
    original = (pixels.shape[0], pixels.shape[1])
    height, width = size or original
    resized = _covering(original, (height, width))
    if resized[0] * resized[1] > MAX_PIXELS:
        raise UndecodableImageError(
            f"it has {original[1]} x {original[0]} pixels, so to cover {width} x {height} it would be resized to "
            f"{resized[1]} x {resized[0]}, more than {MAX_PIXELS:,} pixels"
        )
    pixels = _resized(pixels, *resized)
    mirrored = fitting.flip and bool(draw(fitting.seed, position, Draw.FLIP, 2))
    if mirrored:
        pixels = pixels[:, ::-1]
    spare = (pixels.shape[0] - height, pixels.shape[1] - width)
    top, left = spare[0] // 2, spare[1] // 2
    if fitting.random_crop:
        top = draw(fitting.seed, position, Draw.CROP_TOP, spare[0] + 1)
        left = draw(fitting.seed, position, Draw.CROP_LEFT, spare[1] + 1)
    cut = pixels[top : top + height, left : left + width]
    if mirrored:
        cut = cut.copy(order="K")  # torch does not support negative strides
    return FittedImage(cut, original, resized, (top, left))


def _covering(original: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    scale = max(size[0] / original[0], size[1] / original[1])
    return max(size[0], round(original[0] * scale)), max(size[1], round(original[1] * scale))


def _resized(pixels: NDArray[Any], height: int, width: int) -> NDArray[Any]:
    if pixels.shape[:2] == (height, width):
        return pixels
    import torch  # local: commands that only decode start three times as fast without it
    from torch.nn.functional import interpolate

    deep = pixels.dtype == np.uint16
    values = pixels.astype(np.float32) if deep else pixels  # torch has no kernel for uint16
    batch = torch.from_numpy(values).permute(2, 0, 1).unsqueeze(0)  # a channels-last view, the fast layout
    resized = interpolate(batch, (height, width), mode="bicubic", antialias=True)
    array: NDArray[Any] = resized[0].permute(1, 2, 0).numpy()
    return np.rint(array).clip(0, 65535).astype(np.uint16) if deep else array
