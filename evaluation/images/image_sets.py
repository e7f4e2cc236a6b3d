"""Sets of images to measure or compare with: a folder, a zip file or shards, in a reproducible order."""

from __future__ import annotations

import os
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn, Protocol

from PIL import Image

from data.shards.images import MAX_IMAGE_BYTES, OTHER_SUFFIXES, SUFFIXES
from data.shards.locations import is_remote, leaves
from evaluation.images.set_digest import checksum, digest_of
from evaluation.images.shard_images import ShardImages, decoded_image
from sdxs_lightning.core.errors import UserError


class NumberedImages(Protocol):
    """Images by number, independent of the location of the set; picklable."""

    @property
    def names(self) -> Sequence[str]:
        """Relative paths of the images, in order."""

    @property
    def formats(self) -> str:
        """File extensions joined by "+": "png", "jpg+png". JPEG alone moves FID by a tenth."""

    def read(self, number: int) -> Image.Image:
        """The decoded RGB image.

        Raises:
            UserError: if it cannot be decoded.
        """

    def captions(self) -> list[str] | None:
        """The caption of each image, or None if the set has no captions."""

    def digest(self) -> str:
        """16-digit hex hash of file names and contents, independent of the location; stored in results."""

    def stamp(self) -> str:
        """16-digit hex hash that changes when a file is rewritten, even with the same size; not stored in results."""


def natural_order(name: str) -> tuple[list[int | str], str]:
    """Sort key that compares numbers in a path numerically: `2.png` before `10.png`."""
    parts = re.split(r"([0-9]+)", name)  # text and numbers alternate, so that keys are comparable
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], name


class FolderImages:
    """The images under a folder, in natural order of their paths.

    Args:
        folder: contains at least one image.

    Raises:
        UserError: for a symbolic link to a folder or out of it, an unsupported image format, or a folder that cannot be
            listed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        files: list[Path] = []

        def refuse(error: OSError) -> NoReturn:
            raise UserError(f"'{error.filename}' cannot be listed ({error.strerror}).")

        for root, folders, names in os.walk(folder, onerror=refuse):
            linked = sorted(name for name in folders if os.path.islink(os.path.join(root, name)))
            if linked:
                raise UserError(
                    f"'{os.path.join(root, linked[0])}' is a link to another folder, which is not followed; give that folder "
                    "itself, or copy its images."
                )
            files += [Path(root, name) for name in names]
        check_links(files, folder)
        unnamed = next((file for file in files if not file.suffix and _is_image(file)), None)
        if unnamed is not None:
            raise UserError(
                f"'{unnamed}' is an image whose name has no ending; rename it to .png or what it is."
            )
        paths = [file.relative_to(folder).as_posix() for file in files]
        self.names = image_names(paths, str(folder))
        self.formats = _formats(self.names)
        self._digest = ("", "")

    def read(self, number: int) -> Image.Image:
        path = self.folder / self.names[number]
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UserError(f"'{path}' cannot be read ({error.strerror}).") from error
        return decoded_image(content, str(path))

    def captions(self) -> list[str] | None:
        """Captions from the .txt file beside each image, or None unless all images have one.

        Raises:
            UserError: for an empty or non-UTF-8 file, or one shared by two images.
        """
        files = [(self.folder / name).with_suffix(".txt") for name in self.names]
        if not all(file.is_file() for file in files):
            return None
        shared = next((file for file, count in Counter(files).items() if count > 1), None)
        if shared is not None:
            raise UserError(
                f"two images have the caption file '{shared}'; give --captions FILE with their names instead."
            )
        return [_caption(file) for file in files]

    def digest(self) -> str:
        stamp = self.stamp()
        if self._digest[0] != stamp:
            with ThreadPoolExecutor(4) as threads:  # zlib releases the GIL
                sums = list(threads.map(lambda name: checksum((self.folder / name).read_bytes()), self.names))
            self._digest = stamp, digest_of(self.names, sums)
        return self._digest[1]

    def stamp(self) -> str:
        states = ((self.folder / name).stat() for name in self.names)
        return digest_of(self.names, (f"{state.st_mtime_ns} {state.st_size}" for state in states))


class ZipImages:
    """The images of a zip file, in natural order of their paths.

    Args:
        path: the zip file.

    Raises:
        UserError: for a file that is not a zip file, or an unsupported image format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                members = [info for info in archive.infolist() if not info.is_dir()]
                unnamed = next((info for info in members if _is_unnamed_image(archive, info)), None)
        except (OSError, zipfile.BadZipFile) as error:
            raise UserError(f"'{path}' cannot be read as a zip file ({error}).") from error
        if unnamed is not None:
            raise UserError(
                f"'{path}' holds the image '{unnamed.filename}', whose name has no ending; rename it to .png or what it is."
            )
        found = {info.filename: f"{info.file_size} {info.CRC:08x}" for info in members}
        if len(found) < len(members):
            name = next(name for name, count in Counter(one.filename for one in members).items() if count > 1)
            raise UserError(
                f"'{path}' holds several files called '{name}', of which only the last could be read; pack it anew."
            )
        self.names = image_names(found, str(path))
        self._sums = [found[name] for name in self.names]
        self.formats = _formats(self.names)
        self._archive: zipfile.ZipFile | None = None

    def read(self, number: int) -> Image.Image:
        where = f"{self.path}, '{self.names[number]}'"
        try:
            self._archive = self._archive or zipfile.ZipFile(self.path)
            size = self._archive.getinfo(self.names[number]).file_size
            if size > MAX_IMAGE_BYTES:  # zip compresses zeros a thousandfold
                raise ValueError(f"it unpacks to {size:,} bytes, more than {MAX_IMAGE_BYTES:,}")
            content = self._archive.read(self.names[number])
        except (
            Exception
        ) as error:  # damaged archives raise zlib.error, NotImplementedError, RuntimeError (encrypted), ...
            raise UserError(f"{where}: cannot be read ({error}).") from error
        return decoded_image(content, where)

    def captions(self) -> list[str] | None:
        """None: captions of zip files are given by --captions."""
        return None

    def digest(self) -> str:
        """Equals the digest of the zipped folder."""
        return digest_of(self.names, self._sums)

    def stamp(self) -> str:
        state = self.path.stat()
        return digest_of([self.path.name], [f"{state.st_mtime_ns} {state.st_size}"])

    def __getstate__(self) -> dict[str, Any]:
        """State without the open file, which cannot be pickled."""
        return self.__dict__ | {"_archive": None}


def open_images(text: str) -> NumberedImages:
    """Open the set given by `--images` or `--reference`.

    Raises:
        UserError: if there are no images.
    """
    if is_remote(text):
        return ShardImages(text)
    path = Path(text).expanduser()
    if path.suffix.lower() == ".zip":
        return _filled(ZipImages(path), text)
    if path.is_dir() and not any(path.glob("*.tar")):
        return _filled(FolderImages(path), text)
    if path.is_dir() and any(file.suffix.lower() in SUFFIXES for file in path.iterdir()):
        raise UserError(
            f"'{text}' holds .tar shards and images beside them; give a folder with one of the two."
        )
    if path.is_dir() or ".tar" in text:
        return ShardImages(str(path))
    if not path.exists():
        raise UserError(f"there is nothing at '{text}'; give a folder of images, a .zip file or .tar shards.")
    raise UserError(f"'{text}' is neither a folder of images nor a .zip file nor .tar shards.")


def check_links(files: Iterable[Path], folder: Path) -> None:
    """Refuse links that lead out of a folder, with which a folder of others would show files that it does not hold.

    Raises:
        UserError: for such a link.
    """
    for file in files:
        if file.is_symlink() and leaves(file, folder):
            raise UserError(
                f"'{file}' is a link to a file outside '{folder}', which is not followed; copy the file, or give the folder "
                "that holds it."
            )


def image_names(paths: Iterable[str], where: str) -> list[str]:
    """The images among the paths, in natural order, without hidden files (such as macOS's `._name`).

    Raises:
        UserError: for an unsupported image format.
    """
    visible = [
        path for path in paths if not PurePosixPath(path).name.startswith(".") and "__MACOSX/" not in path
    ]
    unread = sorted(path for path in visible if PurePosixPath(path).suffix.lower() in OTHER_SUFFIXES)
    if unread:
        raise UserError(
            f"'{where}' holds {len(unread)} images of formats that are not read, the first of them '{unread[0]}'; convert "
            f"them to one of {', '.join(SUFFIXES)}, or move them elsewhere."
        )
    return sorted(
        (path for path in visible if PurePosixPath(path).suffix.lower() in SUFFIXES), key=natural_order
    )


def _is_image(file: Path) -> bool:
    """Whether a file has the signature of JPEG, PNG, GIF, WebP, TIFF or AVIF."""
    with file.open("rb") as content:
        return _begins_an_image(content.read(12))


def _is_unnamed_image(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bool:
    """Whether a member of a zip file without ending is an image; False for one that cannot be read."""
    if PurePosixPath(info.filename).suffix:
        return False
    try:
        with archive.open(info) as content:
            return _begins_an_image(content.read(12))
    except Exception:  # encrypted or damaged, which is said of members that are read
        return False


def _begins_an_image(begin: bytes) -> bool:
    return begin.startswith((b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"II*\0", b"MM\0*")) or begin[8:12] in (
        b"WEBP",
        b"avif",
    )


def _filled(images: FolderImages | ZipImages, text: str) -> NumberedImages:
    if not images.names:
        raise UserError(f"'{text}' holds no image; images end in {', '.join(SUFFIXES)}.")
    return images


def _caption(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise UserError(f"'{file}' is not UTF-8 ({error.reason} at byte {error.start}).") from error
    if not text:
        raise UserError(f"'{file}' has no words; write a caption, or give --captions FILE.")
    return text


def _formats(names: Iterable[str]) -> str:
    same = {"jpeg": "jpg", "jfif": "jpg", "tiff": "tif"}
    endings = (PurePosixPath(name).suffix.lower()[1:] for name in names)
    return "+".join(sorted({same.get(ending, ending) for ending in endings}))
