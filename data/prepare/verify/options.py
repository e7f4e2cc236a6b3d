"""The options of `python -m data.prepare verify`. Imported before torch: keep it light."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from data.prepare.common.options import Count, RemoteOptions
from sdxs_lightning.command_line import Option

ReadContent = Literal["captions", "latents", "images", "control_images", "noise_seeds", "sizes"]


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(RemoteOptions):
    """Reads, checks and decodes every byte of shards, and writes their index.

    Every member is decoded as in a training, and compared with the checksums that `images` and `latents` write: of each file
    (SHA256SUMS) and of each member (crc32 in the json). Faults are printed to stdout, one per line; the exit code is 0 if
    there are none. The index of each shard is written beside it, with a checksum of every member: from then on a training
    starts without scanning the shards and detects every byte that changed.
    """

    EXAMPLES: ClassVar[str] = """
    python -m data.prepare verify datasets/photos
    python -m data.prepare verify 'laion/{00000..00999}.tar' --processes 16 --out faults.jsonl
    python -m data.prepare verify datasets/photos --record
    python -m data.prepare verify datasets/pairs --contents latents noise_seeds
    """

    shards: Annotated[tuple[str, ...], Option(positional=True)]
    """Folders, globs, brace patterns or URLs of tars."""
    processes: Count | None = None
    """Number of processes; by default one per core."""
    empty_captions: Literal["refuse", "keep"] = "refuse"
    """Whether an empty caption is a fault (refuse), as data.empty_captions of a training."""
    contents: tuple[ReadContent, ...] | None = None
    """What the training reads, as its data.contents (captions for captions alone): every sample is decoded as there. By default
    every sample needs a caption, and an image or latents."""
    buckets: bool = False
    """The training has data.buckets: latents may have several shapes."""
    out: Path | None = None
    """Also write the faults to this file, as JSON lines (shard, key, reason), the format of data.faults.quarantine."""
    record: bool = False
    """Also write SHA256SUMS for shards that came without, if no shard has a fault."""
