"""The images of WebDataset tars as a numbered set."""

from __future__ import annotations

import bisect
import hashlib
import warnings
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from PIL import Image

from data.shards.decoders import (
    CAPTION_MEMBERS,
    IMAGE_MEMBERS,
    JSON_MEMBER,
    BadSampleError,
    decode,
)
from data.shards.images import decode_pil, open_image
from data.shards.index import ShardSet
from data.shards.locations import is_remote
from data.shards.remote.shard_file import ShardFile
from data.shards.store import ShardStore
from evaluation.images.set_digest import checksum, digest_of
from sdxs_lightning.core.errors import UserError

INDEX_FOLDER = Path.home() / ".cache" / "sdxs-lightning" / "shard-index"
"""Folder of the indexes of remote shards."""


class ShardImages:
    """The images of WebDataset tars, in stored order, with their captions.

    Args:
        shards: a folder, a glob, a brace pattern, or a URL of one.

    Raises:
        UserError: for missing or broken shards, or a sample without an image.
    """

    def __init__(self, shards: str) -> None:
        self._store = ShardStore()
        self._open: dict[int, ShardFile] = {}
        remote = INDEX_FOLDER if is_remote(shards) else None
        try:
            self._shards = ShardSet.open(shards, remote, self._store)
        except (OSError, ValueError) as error:
            raise UserError(str(error)) from error
        self.formats = "+".join(
            sorted(
                {
                    extension.replace("jpeg", "jpg")
                    for shard in self._shards.shards
                    for extension in shard.extensions
                    if extension in IMAGE_MEMBERS
                }
            )
        )
        self.names = [
            f"{name}/{shard.key(row)}"
            for name, shard in zip(self._shards.names(), self._shards.shards, strict=True)
            for row in range(len(shard))
        ]
        self._ends = list(accumulate(self._shards.sizes))
        self._digest = ("", "")

    def read(self, number: int) -> Image.Image:
        _, content, where = self._member(number, IMAGE_MEMBERS)
        if content is None:
            raise UserError(f"{where}: there is no image ({', '.join(IMAGE_MEMBERS)}) in this sample.")
        return decoded_image(content, where)

    def captions(self) -> list[str] | None:
        """Captions from the text or json members; None if a sample has neither."""
        texts = []
        for number in range(len(self.names)):
            extension, content, where = self._member(number, (*CAPTION_MEMBERS, JSON_MEMBER))
            if content is None:
                return None
            try:
                decoded = decode(extension, content, where)
            except BadSampleError as error:
                raise UserError(str(error)) from error
            text = decoded.get("caption") if isinstance(decoded, dict) else decoded
            if not text:
                return None
            texts.append(str(text))
        return texts

    def digest(self) -> str:
        stamp = self.stamp()
        if self._digest[0] != stamp:
            contents = (self._member(number, IMAGE_MEMBERS)[1] for number in range(len(self.names)))
            self._digest = stamp, digest_of(self.names, (checksum(one or b"") for one in contents))
        return self._digest[1]

    def stamp(self) -> str:
        places = [shard.location for shard in self._shards.shards]
        stamps = [self._store.stamp(place) for place in places]
        return hashlib.sha256(repr(list(zip(places, stamps, strict=True))).encode()).hexdigest()[:16]

    def _member(self, number: int, wanted: Sequence[str]) -> tuple[str, bytes | None, str]:
        """Extension and content of the first wanted member of a sample, and its location."""
        shard_number = bisect.bisect_right(self._ends, number)
        shard = self._shards.shards[shard_number]
        row = number - (self._ends[shard_number] - len(shard))
        where = f"{shard.location}, key '{shard.key(row)}'"
        for extension in wanted:
            column = shard.column(extension)
            if column is not None and shard.offsets[row, column] >= 0:
                if shard_number not in self._open:  # one open shard at a time: reads are sequential
                    self._close()
                    self._open[shard_number] = self._store.open(shard.location)
                place = int(shard.offsets[row, column]), int(shard.sizes[row, column])
                return extension, bytes(self._open[shard_number].read(*place)), where
        return "", None, where

    def _close(self) -> None:
        for file in self._open.values():
            file.close()
        self._open.clear()

    def __del__(self) -> None:
        """Close the open shard."""
        if hasattr(self, "_open"):
            self._close()

    def __getstate__(self) -> dict[str, Any]:
        """State without the open shard, which cannot be pickled."""
        return self.__dict__ | {"_open": {}}


def decoded_image(content: bytes, where: str) -> Image.Image:
    """Decode an image like `Image.open(...).convert("RGB")` in clean-fid, torch-fidelity and pytorch-fid.

    That is, an alpha channel is dropped rather than composited, and the EXIF orientation is ignored. Only 16-bit grey
    differs: its upper 8 bits are taken, where Pillow's conversion clips most values to white.

    Args:
        content: content of the file.
        where: name of the file in messages.

    Raises:
        UserError: if it cannot be decoded, or contains several images.
    """
    try:
        opened = open_image(content)
        frames = getattr(opened, "n_frames", 1)
        if opened.format != "MPO" and frames > 1:
            raise UserError(
                f"{where}: holds {frames} images (an animation, or pages); store one image a file."
            )
        if opened.mode.startswith("I") or opened.mode == "F":
            return decode_pil(content, upright=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about palettes with transparency and damaged EXIF
            opened.load()
            return opened.convert("RGB")
    except UserError:
        raise
    except Exception as error:  # Pillow's decoders raise many types for damaged files
        raise UserError(f"{where}: the image cannot be decoded ({error}).") from error
