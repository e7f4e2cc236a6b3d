"""Formats of image files that are read, wherever they come from."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
"""Pillow's names of accepted formats; its other decoders (EPS runs Ghostscript) are never called."""

_STRIP_PIXELS = 1 << 22  # transparency is composited in strips, which avoids three full-size copies


@lru_cache(maxsize=1)
def readable_formats() -> list[str]:
    """FORMATS that this Pillow reads; it can be built without AVIF. For `Image.open(..., formats=...)`."""
    from PIL import Image

    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def as_rgb(image: Image.Image) -> Image.Image:
    """An image as RGB, for training and for use alike: transparency over white, of 16-bit grey the upper 8 bits.

    Raises:
        ValueError: for pixels that are 32-bit numbers.
    """
    from PIL import Image

    if image.mode.startswith("I;16"):
        return _rgb_of_deep_grey(image)
    if image.mode in ("I", "F"):
        raise ValueError(
            f"its pixels are 32-bit numbers (mode {image.mode}), whose black and white are not known; store 8 or 16 bits"
        )
    if not (image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info):
        return image.convert("RGB")
    composed = Image.new("RGB", image.size)
    rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        strip.info = image.info
        white = Image.new("RGBA", strip.size, "white")
        composed.paste(Image.alpha_composite(white, strip.convert("RGBA")).convert("RGB"), (0, top))
    return composed


def fitted(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """An image as it looks (EXIF), as RGB, at a size (height, width); the middle of it where the shape differs.

    Raises:
        ValueError: for pixels that are 32-bit numbers.
    """
    from PIL import Image, ImageOps

    # Cut and scaled in one: a line of 1 x 16 million pixels, scaled first, would be larger than any memory.
    return ImageOps.fit(as_rgb(ImageOps.exif_transpose(image)), size[::-1], Image.Resampling.LANCZOS)


def _rgb_of_deep_grey(image: Image.Image) -> Image.Image:
    """Upper 8 bits of 16-bit grey, as Pillow and libpng treat 16-bit colour; Pillow's own conversion clips to white."""
    import numpy as np
    from PIL import Image

    values = np.asarray(image).astype(np.uint16)
    grey = (values >> 8).astype(np.uint8)
    if isinstance(transparent := image.info.get("transparency"), int):
        grey[values == transparent] = 255
    return Image.fromarray(grey).convert("RGB")
