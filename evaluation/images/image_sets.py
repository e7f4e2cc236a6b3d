"""Images to judge or to compare with: a folder, a zip file or shards, numbered in an order that is the same everywhere."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from PIL import Image

from data.shards.locations import is_remote
from evaluation.images.shard_images import ShardImages, decoded_image
from sdxs_lightning.core.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class ImageSet(Protocol):
    """Images by number. Sample i is the same image wherever the set lies; a source can be sent to another process."""

    @property
    def names(self) -> Sequence[str]:
        """Of the images, in their order."""

    @property
    def formats(self) -> str:
        """Endings that occur, joined by "+": "png", "jpg+png". JPEG alone moves FID by a tenth."""

    def read(self, number: int) -> Image.Image:
        """The image, RGB, decoded to its last row.

        Raises:
            UserError: where it cannot be decoded.
        """

    def captions(self) -> list[str] | None:
        """One an image, where the set holds them."""

    def digest(self) -> str:
        """16 hex digits over what the set holds: names and sizes in bytes, not the folder. Stands in results."""

    def stamp(self) -> str:
        """16 hex digits that change when a file is written anew, be it as long as before. Not for results."""


class FolderImages:
    """The images under a folder, sorted by their path.

    Args:
        folder: holds at least one image.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names = sorted(
            path.relative_to(folder).as_posix()
            for path in folder.rglob("*")
            if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
        )
        self.formats = _formats(self.names)

    def read(self, number: int) -> Image.Image:
        """See ImageSet."""
        path = self.folder / self.names[number]
        return decoded_image(path.read_bytes(), str(path))

    def captions(self) -> list[str] | None:
        """From a .txt file beside each image, where all have one."""
        files = [(self.folder / name).with_suffix(".txt") for name in self.names]
        if not all(file.is_file() for file in files):
            return None
        return [file.read_text(encoding="utf-8-sig").strip() for file in files]

    def digest(self) -> str:
        """See ImageSet."""
        return _digest(self.names, (os.path.getsize(self.folder / name) for name in self.names))

    def stamp(self) -> str:
        """See ImageSet."""
        return _digest(self.names, ((self.folder / name).stat().st_mtime_ns for name in self.names))


class ZipImages:
    """The images of a zip file, sorted by their path.

    Args:
        path: of the file.

    Raises:
        UserError: for a file that is no zip.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                found = {
                    info.filename: info.file_size
                    for info in archive.infolist()
                    if PurePosixPath(info.filename).suffix.lower() in SUFFIXES
                    and not PurePosixPath(info.filename).name.startswith(".")
                }
        except (OSError, zipfile.BadZipFile) as error:
            raise UserError(f"'{path}' cannot be read as a zip file ({error}).") from error
        self.names = sorted(found)
        self._sizes = [found[name] for name in self.names]
        self.formats = _formats(self.names)
        self._archive: zipfile.ZipFile | None = None

    def read(self, number: int) -> Image.Image:
        """See ImageSet."""
        where = f"{self.path}, '{self.names[number]}'"
        try:
            self._archive = self._archive or zipfile.ZipFile(self.path)
            content = self._archive.read(self.names[number])
        except (OSError, zipfile.BadZipFile) as error:
            raise UserError(f"{where}: cannot be read ({error}).") from error
        return decoded_image(content, where)

    def captions(self) -> list[str] | None:
        """None: give a file of captions."""
        return None

    def digest(self) -> str:
        """See ImageSet; equal to that of the folder that was zipped."""
        return _digest(self.names, self._sizes)

    def stamp(self) -> str:
        """See ImageSet."""
        return _digest([self.path.name], [self.path.stat().st_mtime_ns])

    def __getstate__(self) -> dict[str, Any]:
        """Without the open file, which another process cannot use."""
        return self.__dict__ | {"_archive": None}


def open_images(text: str) -> ImageSet:
    """The set that `--images` or `--reference` names.

    Raises:
        UserError: where there are no images.
    """
    if is_remote(text):
        return ShardImages(text)
    path = Path(text).expanduser()
    if path.suffix.lower() == ".zip":
        return _filled(ZipImages(path), text)
    if path.is_dir() and not any(path.glob("*.tar")):
        return _filled(FolderImages(path), text)
    if path.is_dir() or ".tar" in text:
        return ShardImages(str(path))
    if not path.exists():
        raise UserError(f"there is nothing at '{text}'; give a folder of images, a .zip file or .tar shards.")
    raise UserError(f"'{text}' is neither a folder of images nor a .zip file nor .tar shards.")


def _filled(source: FolderImages | ZipImages, text: str) -> ImageSet:
    if not source.names:
        raise UserError(f"'{text}' holds no image; images end in {', '.join(SUFFIXES)}.")
    return source


def _formats(names: Iterable[str]) -> str:
    endings = Counter(PurePosixPath(name).suffix.lower()[1:].replace("jpeg", "jpg") for name in names)
    return "+".join(sorted(endings))


def _digest(names: Sequence[str], sizes: Iterable[int]) -> str:
    """Without the folders that all names have in common, so that `val2014.zip` equals the folder `val2014`."""
    common = len(os.path.commonpath([os.path.dirname(name) for name in names])) if names else 0
    lines = (f"{name[common:].lstrip('/')} {size}" for name, size in zip(names, sizes, strict=True))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
