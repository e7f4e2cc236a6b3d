"""The options of `python -m data.prepare images`. Imported before torch: keep it light."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from data.prepare.common.options import Count, DeviceOptions, OutputOptions, RemoteOptions
from sdxs_lightning.command_line import Option
from sdxs_lightning.core.option_bounds import LARGEST_SIDE_PX

ImageFormat = Literal["jpg", "png", "webp"]
CONDITIONS = ("canny", "soft_edge", "sketch")
"""Condition images without a network; beside them depth:MODEL and given:FOLDER."""


@dataclass(frozen=True, kw_only=True)
class ImageSettings:
    """The options that the shards depend on; images.json keeps them."""

    source: Annotated[str, Option(name="from")]
    """Folder of images, CSV, TSV or parquet file, or tars."""
    image_column: str | None = None
    """Column of a table that holds a path or an image's bytes; by default one with a common name."""
    caption_column: str | None = None
    """Column of a table that holds the caption; by default one with a common name."""
    image_folder: str | None = None
    """Folder that the paths of a table are relative to, and do not leave; by default that of the table."""
    resolution: Annotated[int | None, Option(at_least=1, at_most=LARGEST_SIDE_PX)] = None
    """Pixels of the shorter side; by default images keep their size."""
    crop: Literal["none", "centre"] = "none"
    """With --resolution: none keeps the aspect ratio, centre crops squares."""
    min_side: Annotated[int | None, Option(at_least=0)] = None
    """Leave out images with a shorter side below this; by default --resolution, so that none is enlarged."""
    max_aspect: Annotated[float, Option(at_least=1)] = 4.0
    """Leave out images whose longer side exceeds this multiple of the shorter one."""
    min_caption: Annotated[int, Option(at_least=0)] = 1
    """Leave out captions with fewer characters; 0 keeps samples without a caption."""
    max_caption: Annotated[int, Option(at_least=0)] = 10_000
    """Leave out captions with more characters."""
    condition: str | None = None
    """Also write condition images: canny, soft_edge, sketch, depth:MODEL, or given:FOLDER."""
    image_format: Annotated[ImageFormat, Option(name="format")] = "jpg"
    """Format of images that cannot keep their bytes."""
    quality: Annotated[int, Option(at_least=1, at_most=100)] = 95
    """Quality of jpg and webp."""
    samples_per_shard: Count = 10_000
    """Samples of the source per shard; the shard holds fewer where some are left out."""

    def __post_init__(self) -> None:
        if self.min_side is None:
            object.__setattr__(self, "min_side", self.resolution or 1)
        if self.crop != "none" and self.resolution is None:
            raise ValueError(f"--crop {self.crop} needs --resolution, the side of the squares.")
        if self.min_caption > self.max_caption:
            raise ValueError(
                f"--min_caption {self.min_caption} is above --max_caption {self.max_caption}; no caption fits."
            )
        kind, colon, name = (self.condition or CONDITIONS[0]).partition(":")
        if not ((kind in CONDITIONS and not colon) or (kind in ("depth", "given") and name)):
            raise ValueError(
                f"--condition '{self.condition}' is none of {', '.join(CONDITIONS)}, depth:MODEL, given:FOLDER."
            )


@dataclass(frozen=True, kw_only=True)
class ImageOptions(ImageSettings, OutputOptions, RemoteOptions, DeviceOptions):
    """Packs images and captions into shards: filtered, resized on request, with their original sizes.

    --from is a folder of images (captions in files of the same name that end in txt, text, caption or json), a CSV, TSV or
    parquet file, or tars as img2dataset writes them. JPEG, PNG and WebP files keep their bytes unless they are resized or
    rotated by an EXIF tag. An interrupted run resumes when the same command is given again, with any number of processes,
    and the shards come out the same.
    """

    conditions: Annotated[str | None, Option(metavar="FOLDER")] = None
    """Folder of condition images with the paths of the images, endings aside: short for --condition given:FOLDER."""

    def __post_init__(self) -> None:
        if self.conditions is not None:
            if self.condition is not None:
                raise ValueError(
                    f"--conditions {self.conditions} and --condition {self.condition} both name condition images; give one."
                )
            object.__setattr__(self, "condition", f"given:{self.conditions}")
        super().__post_init__()
        self.check_ray()

    EXAMPLES: ClassVar[str] = """
    python -m data.prepare images --from photos/ --out datasets/photos
    python -m data.prepare images --from photos/metadata.csv --image_column file_name --caption_column text \\
        --resolution 1024 --min_side 768 --max_aspect 2 --out datasets/photos-1024
    python -m data.prepare images --from 'laion/{00000..00999}.tar' --min_caption 10 --processes 16 --out datasets/laion
    srun --nodes 8 python -m data.prepare images --from 'laion/{00000..00999}.tar' --out datasets/laion
    python -m data.prepare images --from 'laion/{00000..00999}.tar' --ray --out s3://bucket/laion
    python -m data.prepare images --from photos/ --condition canny --out datasets/photos-canny
    python -m data.prepare images --from photos/ --conditions sketches/ --out datasets/photos-sketches
    """
