"""Formats of image files that are read, wherever they come from."""

from functools import lru_cache

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
"""Pillow's names of accepted formats; its other decoders (EPS runs Ghostscript) are never called."""


@lru_cache(maxsize=1)
def readable_formats() -> list[str]:
    """FORMATS that this Pillow reads; it can be built without AVIF. For `Image.open(..., formats=...)`."""
    from PIL import Image

    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]
