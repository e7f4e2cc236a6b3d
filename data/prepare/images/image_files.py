"""Image files of unknown origin: decoded upright and in RGB, or refused; and encoded again."""

from __future__ import annotations

import io
import warnings
from typing import NamedTuple

from PIL import Image, ImageOps, UnidentifiedImageError

from data.prepare.images.options import ImageFormat
from data.shards.images import MAX_PIXELS

_MEMBER_OF = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
"""Formats whose bytes can be stored unchanged, and the member that holds them."""
_ORIENTATION = 0x0112


class UnreadableImageError(ValueError):
    """The bytes do not hold a complete image."""


class DecodedImage(NamedTuple):
    """An image, and whether its file can be stored unchanged."""

    image: Image.Image
    """RGB, upright."""
    member: str | None
    """The member for the unchanged bytes; None for a format that the reader does not know, or an image that is rotated by its
    EXIF tag, which the reader ignores."""


def open_image(content: bytes) -> DecodedImage:
    """Decodes an image completely; transparency is composited over white, as by the reader.

    Raises:
        UnreadableImageError: for bytes that hold no complete image, or one of more than MAX_PIXELS.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content)) as opened:
                if opened.width * opened.height > MAX_PIXELS:
                    raise ValueError(f"{opened.width}x{opened.height} is more than {MAX_PIXELS:,} pixels")
                opened.load()
                member = _MEMBER_OF.get(opened.format or "")
                if opened.getexif().get(_ORIENTATION, 1) != 1:
                    member = None
                image = ImageOps.exif_transpose(opened)
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return DecodedImage(image.convert("RGB"), member)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UnreadableImageError(f"the image cannot be decoded ({error})") from error


def encode_image(image: Image.Image, image_format: ImageFormat, quality: int) -> bytes:
    """The file of an image.

    Args:
        image: RGB.
        image_format: png is lossless.
        quality: of jpg and webp, 1 to 100.
    """
    stream = io.BytesIO()
    if image_format == "jpg":
        # 4:4:4 from 90 on: chroma subsampling is visible at the edges of training images.
        image.save(stream, "JPEG", quality=quality, subsampling=0 if quality >= 90 else 2)
    elif image_format == "webp":
        image.save(stream, "WEBP", quality=quality)
    else:
        image.save(stream, "PNG")
    return stream.getvalue()
