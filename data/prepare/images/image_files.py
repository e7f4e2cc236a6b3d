"""Pictures of unknown origin: opened upright and in RGB, or refused in words; and written again."""

from __future__ import annotations

import io
import warnings
from typing import Literal, NamedTuple

from PIL import Image, ImageOps, UnidentifiedImageError

from data.shards.images import MAX_PIXELS

ImageFormat = Literal["jpg", "png", "webp"]

_MEMBER_OF = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
"""Formats whose bytes can stay as they are, and the member they are kept in."""
_ORIENTATION = 0x0112


class UnreadableImageError(ValueError):
    """Bytes that do not hold a whole picture."""


class Picture(NamedTuple):
    """A picture."""

    image: Image.Image
    """RGB, upright."""
    member: str | None
    """Where its bytes can stay as they are; None where they cannot: for a format that the reader does not know, or a picture
    that lies on its side by its EXIF tag, which the reader does not look at."""


def open_picture(content: bytes) -> Picture:
    """Decodes a picture to its last row; transparency is laid over white, as by the reader.

    Raises:
        UnreadableImageError: for bytes that hold no whole picture, or one of more than MAX_PIXELS.
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
        return Picture(image.convert("RGB"), member)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UnreadableImageError(f"the image cannot be decoded ({error})") from error


def write_picture(image: Image.Image, image_format: ImageFormat, quality: int) -> bytes:
    """The bytes of a picture.

    Args:
        image: RGB.
        image_format: png is lossless.
        quality: of jpg and webp, 1 to 100.
    """
    stream = io.BytesIO()
    if image_format == "jpg":
        # 4:4:4 from 90 on: halved colour is seen at the edges of a model's training pictures.
        image.save(stream, "JPEG", quality=quality, subsampling=0 if quality >= 90 else 2)
    elif image_format == "webp":
        image.save(stream, "WEBP", quality=quality)
    else:
        image.save(stream, "PNG")
    return stream.getvalue()
