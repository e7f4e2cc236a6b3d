"""Sources of images with captions: a folder, tables, or shards; the samples of each have a fixed order."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from data.prepare.common.options import RemoteOptions
from data.prepare.common.raw_shards import RawSample, RawShards, open_shards, shard_store
from data.shards.decoders import (
    CAPTION_MEMBERS,
    CONTROL_IMAGE_MEMBERS,
    IMAGE_MEMBERS,
    JSON_MEMBER,
    BadSampleError,
    decode_json,
    decode_text,
)
from data.shards.images import OTHER_SUFFIXES, SUFFIXES
from data.shards.index import expand_braces, find_shards
from data.shards.locations import leaves, linked_folder
from data.shards.sample_decoder import invalid_fields
from sdxs_lightning.core.errors import OneLineError, UserError

_TABLE_SUFFIXES = (".csv", ".tsv", ".parquet")
_IMAGE_COLUMNS = ("image", "image_path", "file_name", "filename", "filepath", "path", "jpg", "img")
_CAPTION_COLUMNS = ("caption", "text", "prompt", "TEXT")


class SampleFaultError(OneLineError, ValueError):
    """A sample that is broken; the message says how."""


@dataclass(frozen=True)
class SourceSample:
    """One sample of a source."""

    where: str
    """Its name in the source, for messages."""
    image: bytes
    """A file in a format that Pillow reads."""
    caption: Any
    """Text; anything else counts as no caption."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Further data: the json of a tar's sample, other columns of a table."""
    control: bytes | None = None
    """A condition image that came with it."""


class ImageSource(Protocol):
    """Samples by index, the same ones on every machine."""

    fingerprint: str
    """Fingerprint of names and sizes, not of contents."""

    def __len__(self) -> int:
        """Number of samples."""

    def read(self, index: int) -> SourceSample:
        """One sample.

        Raises:
            SampleFaultError: for one that is broken.
        """


class FolderSource:
    """All images below a folder, sorted by path; the caption is in a file of the same name that ends in txt, text, caption or
    json.

    Args:
        folder: searched with its subfolders.

    Raises:
        UserError: if there is no image, an image of another format, or a link to another folder or out of this one.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        linked = linked_folder(folder)
        if linked is not None:
            raise UserError(
                f"--from '{folder}': '{linked}' is a link to a folder, which is not followed; give that folder itself, or copy "
                "its images."
            )
        files = [path for path in folder.rglob("*") if not path.name.startswith(".")]
        unread = sorted(path for path in files if path.suffix.lower() in OTHER_SUFFIXES)
        if unread:
            raise UserError(
                f"--from '{folder}' holds {len(unread)} images of formats that are not read, the first of them '{unread[0]}'; "
                f"convert them to one of {', '.join(SUFFIXES)}, or move them elsewhere."
            )
        found = [path for path in files if path.suffix.lower() in SUFFIXES]
        for path in found:
            _refuse_outside(path, folder)
        self.paths = sorted(path.relative_to(folder).as_posix() for path in found)
        if not self.paths:
            raise UserError(
                f"--from '{folder}' holds neither images ({', '.join(sorted(SUFFIXES))}) nor shards (.tar)."
            )
        self.fingerprint = _digest(f"{path} {(folder / path).stat().st_size}" for path in self.paths)

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> SourceSample:
        path = self._folder / self.paths[index]
        try:
            return self._read(path, self.paths[index])
        except OSError as error:
            raise SampleFaultError(f"{path} cannot be read ({error.strerror})") from error
        except SampleFaultError as error:
            raise SampleFaultError(f"{path}: {error}") from error

    def _read(self, path: Path, where: str) -> SourceSample:
        described = path.with_suffix(".json")
        files = [path.with_suffix(f".{name}") for name in CAPTION_MEMBERS]
        for file in (described, *files):
            _refuse_outside(file, self._folder)
        fields = _json_object(described.read_bytes()) if described.is_file() else {}
        texts = [file.read_bytes() for file in files if file.is_file()]
        caption = _text(texts[0]) if texts else fields.get("caption")
        return SourceSample(where, path.read_bytes(), caption, fields)


class ShardSource:
    """The samples of tars, as img2dataset and `data.prepare` write them.

    Args:
        shards: a folder, glob, brace pattern or URL.
        remote: access to remote shards.

    Raises:
        UserError: for shards that are missing or broken.
    """

    def __init__(self, shards: str, remote: RemoteOptions) -> None:
        try:
            found = open_shards(shards, remote)
        except (OSError, ValueError) as error:
            raise UserError(f"--from '{shards}': {error}") from error
        self._samples = RawShards(found, shard_store(remote))
        self.fingerprint = found.fingerprint

    def __len__(self) -> int:
        return len(self._samples)

    def read(self, index: int) -> SourceSample:
        sample = self._samples.sample(index)
        try:
            return from_members(sample)
        except SampleFaultError as error:
            raise SampleFaultError(f"{sample.where}: {error}") from error


class TableSource:
    """The rows of tables.

    An image is a path below the image folder, bytes, or a struct of both as the datasets library writes it. Other
    columns of numbers and text go into the json of a sample.

    Args:
        files: of one kind.
        image_column: None looks for a common name.
        caption_column: None looks for a common name.
        image_folder: folder that paths are relative to and do not leave; None is the folder of each table.

    Raises:
        UserError: for a table that cannot be read or lacks a column.
    """

    def __init__(
        self,
        files: Sequence[Path],
        image_column: str | None,
        caption_column: str | None,
        image_folder: Path | None = None,
    ) -> None:
        self._image_folder = image_folder
        self._groups: list[tuple[Path, int]] = []
        sizes: list[int] = []
        found = hashlib.sha256()
        for file in files:
            try:
                columns, rows = _layout(file)
            except (OSError, pa.ArrowException) as error:
                raise UserError(f"--from '{file}' cannot be read ({error}).") from error
            self._image = _column(file, columns, image_column, _IMAGE_COLUMNS, "--image_column")
            self._caption = _column(file, columns, caption_column, _CAPTION_COLUMNS, "--caption_column")
            self._groups += [(file, group) for group in range(len(rows))]
            sizes += rows
            found.update(f"{file.name} {file.stat().st_size} {rows}\n".encode())
        self._ends = list(accumulate(sizes))
        if not self._ends or not self._ends[-1]:
            raise UserError(f"--from '{files[0]}' holds no row.")
        self.fingerprint = found.hexdigest()[:16]
        self._open: tuple[int, pa.Table] | None = None

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, index: int) -> SourceSample:
        group = bisect_right(self._ends, index)
        if self._open is None or self._open[0] != group:
            self._open = group, _read_group(*self._groups[group])
        start = self._ends[group - 1] if group else 0
        row: dict[str, Any] = self._open[1].slice(index - start, 1).to_pylist()[0]
        file = self._groups[group][0]
        image, caption = row.pop(self._image), row.pop(self._caption)
        # JSON has no NaN.
        fields = {name: one for name, one in row.items() if isinstance(one, str | int | float) and one == one}
        where = f"{file}, row {index - start}"
        try:
            folder = file.parent if self._image_folder is None else self._image_folder
            return SourceSample(where, _bytes(image, folder, where), caption, fields)
        except (SampleFaultError, OSError) as error:
            raise SampleFaultError(f"{where}: {error}") from error


def _layout(file: Path) -> tuple[list[str], list[int]]:
    """Names of the columns, and the number of rows of each group that is read at once."""
    if file.suffix.lower() != ".parquet":
        table = _read_group(file, 0)
        return table.column_names, [table.num_rows]
    opened = pq.ParquetFile(file)
    metadata = opened.metadata
    groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    return opened.schema_arrow.names, groups


def _read_group(file: Path, group: int) -> pa.Table:
    if file.suffix.lower() == ".parquet":
        return pq.ParquetFile(file).read_row_group(group)
    # Captions with line breaks in quotes are common; without this they would be split.
    parse = pyarrow.csv.ParseOptions(
        delimiter="\t" if file.suffix.lower() == ".tsv" else ",", newlines_in_values=True
    )
    return pyarrow.csv.read_csv(file, parse_options=parse)


def _column(file: Path, columns: Sequence[str], named: str | None, common: Sequence[str], option: str) -> str:
    chosen = next((one for one in ((named,) if named else common) if one in columns), None)
    if chosen is None:
        wanted = f"no column '{named}'" if named else f"none of the columns {', '.join(common)}"
        raise UserError(f"--from '{file}' has {wanted}; name one of {', '.join(columns)} with {option}.")
    return chosen


def _bytes(image: Any, folder: Path, where: str) -> bytes:
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, bytes):
        return image
    if not isinstance(image, str) or not image:
        raise SampleFaultError("there is no image in this row")
    if "://" in image:
        raise SampleFaultError(
            f"'{image}' must be downloaded first; img2dataset makes tars from a table of URLs"
        )
    path = folder / image
    if leaves(path, folder):
        raise UserError(
            f"{where}: '{image}' is outside the folder '{folder}', and a table cannot take files from elsewhere; name the "
            "folder that holds all images with --image_folder."
        )
    if not path.is_file():
        raise SampleFaultError(f"there is no file '{path}'")
    return path.read_bytes()


def from_members(sample: RawSample) -> SourceSample:
    """Image, caption and json among the members of a shard's sample.

    Raises:
        SampleFaultError: if there is no image, or caption or json are broken.
    """
    members = sample.members
    fields = _json_object(members[JSON_MEMBER]) if JSON_MEMBER in members else {}
    for reason in invalid_fields(fields):
        raise SampleFaultError(f"{JSON_MEMBER}: {reason}")
    image = _first(members, IMAGE_MEMBERS)
    if image is None:
        raise SampleFaultError(f"there is no image ({', '.join(IMAGE_MEMBERS)})")
    caption_bytes = _first(members, CAPTION_MEMBERS)
    caption = fields.get("caption") if caption_bytes is None else _text(caption_bytes)
    control = _first(members, CONTROL_IMAGE_MEMBERS)
    return SourceSample(sample.where, image, caption, fields, control)


def open_source(
    source: str,
    image_column: str | None = None,
    caption_column: str | None = None,
    remote: RemoteOptions = RemoteOptions(),
    image_folder: Path | None = None,
) -> ImageSource:
    """Opens what `--from` names.

    Args:
        source: a folder of images, tars or parquet files; a CSV, TSV or parquet file, glob or brace pattern; tars.
        image_column: of tables; None looks for a common name.
        caption_column: of tables; None looks for a common name.
        remote: access to remote shards.
        image_folder: of tables, folder that their paths are relative to and do not leave; None is the folder of the table.

    Raises:
        UserError: if it is none of these, or empty.
    """
    path = Path(source)
    if path.suffix.lower() in _TABLE_SUFFIXES:
        return TableSource(_files(source), image_column, caption_column, image_folder)
    if not path.is_dir():
        return ShardSource(source, remote)
    tars, tables = any(path.glob("*.tar")), sorted(path.glob("*.parquet"))
    if tars or tables:
        _refuse_images_beside(path, "tars" if tars else "parquet files")
    if tars:  # with or without the tables that img2dataset and this command write beside them
        return ShardSource(source, remote)
    return TableSource(tables, image_column, caption_column, image_folder) if tables else FolderSource(path)


def _refuse_images_beside(folder: Path, others: str) -> None:
    """Refuses a folder of tars or tables with images, which would be left out."""
    if any(file.suffix.lower() in SUFFIXES and file.name[0] != "." for file in folder.iterdir()):
        raise UserError(
            f"--from '{folder}' holds {others} and images; give a folder of one kind, or the files of one as a pattern."
        )


def _refuse_outside(path: Path, folder: Path) -> None:
    if path.is_symlink() and leaves(path, folder):
        raise UserError(
            f"--from '{folder}': '{path}' is a link to a file outside that folder, which is not followed; copy the file, or "
            "give the folder that holds it."
        )


def _files(named: str) -> list[Path]:
    try:
        return [path for one in expand_braces(named) for path in find_shards(one)]
    except FileNotFoundError:
        raise UserError(f"--from '{named}': there is no such file.") from None


def _first(members: Mapping[str, bytes], names: Iterable[str]) -> bytes | None:
    """The first of several members that a sample has, or None."""
    return next((members[name] for name in names if name in members), None)


def _text(content: bytes) -> str:
    """UTF-8 text without surrounding whitespace.

    Raises:
        SampleFaultError: for other bytes.
    """
    try:
        return decode_text(content, "")
    except BadSampleError as error:
        raise SampleFaultError(str(error).removeprefix(": ").rstrip(".")) from error


def _json_object(content: bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
        SampleFaultError: for other bytes.
    """
    try:
        return decode_json(content, "")
    except BadSampleError as error:
        raise SampleFaultError(str(error).removeprefix(": ").rstrip(".")) from error


def _digest(lines: Iterable[str]) -> str:
    """A short hash of several lines."""
    found = hashlib.sha256()
    for line in lines:
        found.update(f"{line}\n".encode("utf-8", "surrogateescape"))
    return found.hexdigest()[:16]
