"""Where pictures with captions come from: a folder, tables, or shards; the samples of each have a fixed order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from data.prepare.common.raw_shards import RawSample, RawShards
from data.prepare.common.remote import Reach
from data.prepare.images.source_sample import SampleFaultError, SourceSample
from data.prepare.images.tables import TABLES, TableSource
from data.shards.decoders import CAPTION_MEMBERS, CONTROL_IMAGE_MEMBERS, IMAGE_MEMBERS, JSON_MEMBER
from data.shards.index import expand_braces, find_shards
from sdxs_lightning.core.errors import UserError

_IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"}


class ImageSource(Protocol):
    """Samples by index, the same ones on every machine."""

    fingerprint: str
    """Of names and sizes, not of contents."""

    def __len__(self) -> int:
        """Samples in all."""

    def read(self, index: int) -> SourceSample:
        """One sample.

        Raises:
            SampleFaultError: for one that is broken.
        """


class Columns(NamedTuple):
    """What `--image-column` and `--caption-column` say; None looks for a usual name."""

    image: str | None
    caption: str | None


class FolderSource:
    """Every picture below a folder, by path; its caption is in a file of the same name that ends in txt, text, caption or json.

    Args:
        folder: searched with its subfolders.

    Raises:
        UserError: where there is no picture.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        found = (path for path in folder.rglob("*") if path.suffix.lower() in _IMAGE_SUFFIXES)
        self.paths = sorted(path.relative_to(folder).as_posix() for path in found)
        if not self.paths:
            raise UserError(
                f"--from '{folder}' holds neither pictures ({', '.join(sorted(_IMAGE_SUFFIXES))}) nor shards (.tar)."
            )
        self.fingerprint = digest(f"{path} {(folder / path).stat().st_size}" for path in self.paths)

    def __len__(self) -> int:
        """See `ImageSource`."""
        return len(self.paths)

    def read(self, index: int) -> SourceSample:
        """See `ImageSource`."""
        path = self._folder / self.paths[index]
        try:
            return self._read(path, self.paths[index])
        except OSError as error:
            raise SampleFaultError(f"{path} cannot be read ({error.strerror})") from error
        except SampleFaultError as error:
            raise SampleFaultError(f"{path}: {error}") from error

    def _read(self, path: Path, where: str) -> SourceSample:
        described = path.with_suffix(".json")
        fields = json_object(described.read_bytes()) if described.is_file() else {}
        files = [path.with_suffix(f".{name}") for name in CAPTION_MEMBERS]
        texts = [file.read_bytes() for file in files if file.is_file()]
        caption = text(texts[0]) if texts else fields.get("caption")
        return SourceSample(where, path.read_bytes(), caption, fields)


class ShardSource:
    """The samples of tars, as img2dataset and `data.prepare` write them.

    Args:
        shards: a folder, glob, brace pattern or URL.
        reach: how they are reached.

    Raises:
        UserError: for shards that are not there or broken.
    """

    def __init__(self, shards: str, reach: Reach) -> None:
        try:
            found = reach.open(shards)
        except (OSError, ValueError) as error:
            raise UserError(f"--from '{shards}': {error}") from error
        self._samples = RawShards(found, reach.store())
        self.fingerprint = found.fingerprint

    def __len__(self) -> int:
        """See `ImageSource`."""
        return len(self._samples)

    def read(self, index: int) -> SourceSample:
        """See `ImageSource`."""
        sample = self._samples.sample(index)
        try:
            return from_members(sample)
        except SampleFaultError as error:
            raise SampleFaultError(f"{sample.where}: {error}") from error


def from_members(sample: RawSample) -> SourceSample:
    """The picture and caption among the members of a shard's sample.

    Raises:
        SampleFaultError: where there is no picture, or caption or json are broken.
    """
    members = sample.members
    fields = json_object(members[JSON_MEMBER]) if JSON_MEMBER in members else {}
    image = first(members, IMAGE_MEMBERS)
    if image is None:
        raise SampleFaultError(f"there is no image ({', '.join(IMAGE_MEMBERS)})")
    words = first(members, CAPTION_MEMBERS)
    caption = fields.get("caption") if words is None else text(words)
    control = first(members, CONTROL_IMAGE_MEMBERS)
    return SourceSample(sample.where, image, caption, fields, control)


def open_source(named: str, columns: Columns, reach: Reach = Reach()) -> ImageSource:
    """What `--from` names.

    Args:
        named: a folder of pictures, tars or parquet files; a CSV, TSV or parquet file, glob or brace pattern; tars.
        columns: of tables.
        reach: how shards are reached.

    Raises:
        UserError: where it is none of these, or holds nothing.
    """
    path = Path(named)
    if path.suffix.lower() in TABLES:
        return TableSource(_files(named), columns.image, columns.caption)
    if not path.is_dir():
        return ShardSource(named, reach)
    if any(path.glob("*.tar")):
        return ShardSource(named, reach)
    tables = sorted(path.glob("*.parquet"))
    return TableSource(tables, columns.image, columns.caption) if tables else FolderSource(path)


def _files(named: str) -> list[Path]:
    try:
        return [path for one in expand_braces(named) for path in find_shards(one)]
    except FileNotFoundError:
        raise UserError(f"--from '{named}': there is no such file.") from None


def first(members: Mapping[str, bytes], names: Iterable[str]) -> bytes | None:
    """The first of several members that a sample has."""
    return next((members[name] for name in names if name in members), None)


def text(content: bytes) -> str:
    """UTF-8 text without surrounding white space.

    Raises:
        SampleFaultError: for other bytes.
    """
    try:
        return content.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise SampleFaultError(f"the caption is not UTF-8 ({error.reason} at byte {error.start})") from error


def json_object(content: bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
        SampleFaultError: for other bytes.
    """
    try:
        value = json.loads(content)
    except ValueError as error:
        raise SampleFaultError(f"the json cannot be parsed ({error})") from error
    if not isinstance(value, dict):
        raise SampleFaultError(f"the json holds a {type(value).__name__}, but an object is needed")
    return value


def digest(lines: Iterable[str]) -> str:
    """A short hash of several lines."""
    found = hashlib.sha256()
    for line in lines:
        found.update(f"{line}\n".encode("utf-8", "surrogateescape"))
    return found.hexdigest()[:16]
