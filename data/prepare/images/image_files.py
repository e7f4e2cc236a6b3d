"""Image files of unknown origin: decoded upright and in RGB, or refused; and encoded again."""

from __future__ import annotations

import io
from typing import NamedTuple

from PIL import Image

from data.prepare.images.options import ImageFormat
from data.shards import images
from sdxs_lightning.core.errors import OneLineError

_MEMBER_OF = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
"""Formats whose bytes can be stored unchanged, and the member that holds them."""


class UnreadableImageError(OneLineError, ValueError):
    """The bytes do not hold a complete image."""


class DecodedImage(NamedTuple):
    """An image, and whether its file can be stored unchanged."""

    image: Image.Image
    """RGB, upright."""
    member: str | None
    """The member for the unchanged bytes; None for a format that the reader does not know, or an image that is rotated by its
    EXIF tag, which other readers may ignore."""


def read_image(content: bytes) -> DecodedImage:
    """Decodes an image completely, upright and in RGB, as the reader does.

    Raises:
        UnreadableImageError: for bytes that hold no complete image, or one of more than MAX_PIXELS.
    """
    try:
        opened = images.open_image(content)
        member = _MEMBER_OF.get(opened.format or "") if images.orientation(opened) == 1 else None
        return DecodedImage(images.decode_pil(content), member)
    except images.UndecodableImageError as error:
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
