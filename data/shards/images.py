"""Pictures as arrays: decoded by the fastest decoder at hand, resized, cropped, mirrored.

JPEG goes through OpenCV (libjpeg-turbo, straight into an array) where that is as strict as PIL about files
that were cut, and everything else through PIL; both give the same pixels. Resizing is bicubic with
antialiasing; torch's kernel takes a fifth of the time of PIL's and differs from it by at most 1 of 255.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch.nn.functional import interpolate

from data.shards.choices import Draw, draw

MAX_PIXELS = 100_000_000
"""A file of a few kB can claim more than memory holds. 10,000 x 10,000 is beyond any training picture."""

Bytes = bytes | memoryview


class UndecodableImageError(ValueError):
    """Bytes that are no picture, only a part of one, or too large a one."""


@lru_cache(maxsize=1)
def fast_jpeg_decoder() -> Callable[[Bytes], NDArray[np.uint8] | None] | None:
    """OpenCV's decoder, from bytes to (H, W, 3) or None if they cannot be decoded.

    None where there is no OpenCV, or one that would give a grey lower half for a file that was cut, as versions
    before 4.11 may. Imported when it is first asked for; ask before reading processes are forked.
    """
    try:
        import cv2

        # As PIL, and unlike OpenCV's default, the orientation that cameras note is left alone.
        flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    except (ImportError, AttributeError):
        return None

    def decode(content: Bytes) -> NDArray[np.uint8] | None:
        try:
            array: Any = cv2.imdecode(np.frombuffer(content, dtype=np.uint8), flags)
        except cv2.error:
            return None
        return None if array is None else np.asarray(array, dtype=np.uint8)

    stream = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(stream, "JPEG")
    return decode if decode(stream.getvalue()[:-40]) is None else None


def decode_pixels(content: Bytes) -> NDArray[np.uint8]:
    """A picture as (H, W, 3), uint8 RGB, decoded to its last row; transparency is laid over white.

    Raises:
        UndecodableImageError: if it cannot be decoded, or has more than MAX_PIXELS.
    """
    opened = _opened(content)
    decode = fast_jpeg_decoder() if opened.format == "JPEG" and opened.mode in ("RGB", "L") else None
    if decode is None:
        return np.array(_loaded(opened))
    array = decode(content)
    if array is None:
        raise UndecodableImageError("its JPEG data is broken or was cut")
    return array


def decode_pil(content: Bytes) -> Image.Image:
    """As `decode_pixels`, always by PIL."""
    return _loaded(_opened(content))


_UNREADABLE = (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def _opened(content: Bytes) -> Image.Image:
    """The header of a picture, nothing decoded yet."""
    try:
        opened = Image.open(io.BytesIO(content))
    except _UNREADABLE as error:
        raise UndecodableImageError(str(error)) from error
    if opened.width * opened.height > MAX_PIXELS:
        raise UndecodableImageError(
            f"it has {opened.width} x {opened.height} pixels, more than {MAX_PIXELS:,} (MAX_PIXELS in data/shards/images.py)"
        )
    return opened


def _loaded(opened: Image.Image) -> Image.Image:
    try:
        opened.load()  # a JPEG that was cut short fails here rather than giving a grey lower half
        if opened.mode in ("RGBA", "LA", "PA") or "transparency" in opened.info:
            white = Image.new("RGBA", opened.size, "white")
            return Image.alpha_composite(white, opened.convert("RGBA")).convert("RGB")
        return opened.convert("RGB")
    except _UNREADABLE as error:
        raise UndecodableImageError(str(error)) from error


def image_size(content: Bytes) -> tuple[int, int]:
    """Height and width of a picture, from its header.

    Raises:
        UndecodableImageError: as `decode_pixels`.
    """
    opened = _opened(content)
    return opened.height, opened.width


@dataclass(frozen=True)
class Fitting:
    """How a picture is brought to the size of its batch."""

    seed: int = 0
    random_crop: bool = False
    """A place drawn for each visit; otherwise the middle."""
    flip: bool = False
    """Half of the visits see the picture mirrored."""


@dataclass(frozen=True)
class FittedImage:
    """A picture of its batch's size, and where it came from."""

    pixels: NDArray[np.uint8]
    """(H, W, 3); may be a view of an array with the channels first, as batches have them."""
    original_size: tuple[int, int]
    """Height and width before resizing."""
    crop: tuple[int, int]
    """Top and left of the crop in the resized (and mirrored) picture."""
    scale: tuple[float, float]
    """Resized over stored height and width."""


def fit(
    pixels: NDArray[np.uint8], size: tuple[int, int] | None, fitting: Fitting, position: int
) -> FittedImage:
    """Resize so that the picture covers a size, mirror, and crop to that size.

    Args:
        pixels: (H, W, 3).
        size: height and width; None leaves the picture's own.
        fitting: how.
        position: of the sample, for what is drawn.
    """
    original = (pixels.shape[0], pixels.shape[1])
    height, width = size or original
    resized = _covering(original, (height, width))
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
        cut = cut.copy(order="K")  # torch takes no negative strides
    return FittedImage(cut, original, (top, left), (resized[0] / original[0], resized[1] / original[1]))


def _covering(original: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    scale = max(size[0] / original[0], size[1] / original[1])
    return max(size[0], round(original[0] * scale)), max(size[1], round(original[1] * scale))


def _resized(pixels: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    if pixels.shape[:2] == (height, width):
        return pixels
    batch = torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0)  # a view, channels last: the fast layout
    resized = interpolate(batch, (height, width), mode="bicubic", antialias=True)
    array: NDArray[np.uint8] = resized[0].permute(1, 2, 0).numpy()
    return array
