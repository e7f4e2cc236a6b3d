"""What a set of images is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from data.prepare.images.image_files import ImageFormat

SETTINGS_FILE = "images.json"
NAMES_ONLY = ("source",)
Crop = Literal["none", "centre"]


@dataclass(frozen=True, kw_only=True)
class ImageSettings:
    """Everything that the shards depend on, but for the contents of the source's files."""

    source: str
    """As named on the command line."""
    image_column: str | None
    """Of a table; None looks for a usual name."""
    caption_column: str | None
    """Likewise."""
    source_fingerprint: str
    """Of the source's names and sizes."""
    count: int
    """Samples of the source."""
    samples_per_shard: int
    """Samples of the source that a shard is made of; it keeps fewer where some are left out."""
    resolution: int | None
    """Pixels of the shorter side; None leaves pictures as they are."""
    crop: Crop
    """With a resolution: "centre" makes squares, "none" keeps the aspect."""
    image_format: ImageFormat
    """Of pictures whose bytes do not stay as they are."""
    quality: int
    """Of jpg and webp."""
    min_side: int
    """Pictures with a shorter side below this are left out."""
    max_aspect: float
    """Longer by shorter side, at most."""
    min_caption: int
    """Characters of a caption, at least; 0 keeps samples without words."""
    max_caption: int
    """Characters, at most."""
    condition: str | None
    """What makes a condition image of each picture."""
    format: int = 1
    """Raised when the same settings would give other shards."""

    @property
    def shards(self) -> int:
        """Number of shards of the whole set."""
        return -(-self.count // self.samples_per_shard)

    def indices(self, shard: int) -> range:
        """The samples of the source that a shard is made of."""
        return range(shard * self.samples_per_shard, min((shard + 1) * self.samples_per_shard, self.count))
