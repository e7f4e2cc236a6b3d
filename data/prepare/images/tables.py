"""Pictures and captions from tables: CSV or TSV with paths, parquet with paths or with the pictures themselves."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from data.prepare.images.source_sample import SampleFaultError, SourceSample
from sdxs_lightning.core.errors import UserError

TABLES = (".csv", ".tsv", ".parquet")
IMAGE_COLUMNS = ("image", "image_path", "file_name", "filename", "filepath", "path", "jpg", "img")
CAPTION_COLUMNS = ("caption", "text", "prompt", "TEXT")


class TableSource:
    """The rows of tables.

    A picture is a path (absolute, or from the table's folder), bytes, or a struct of both as the datasets library writes it.
    Other columns of numbers and text go into the json of a sample.

    Args:
        files: of one kind.
        image_column: None looks for a usual name.
        caption_column: likewise.

    Raises:
        UserError: for a table that cannot be read or lacks a column.
    """

    def __init__(self, files: Sequence[Path], image_column: str | None, caption_column: str | None) -> None:
        self._groups: list[tuple[Path, int]] = []
        sizes: list[int] = []
        found = hashlib.sha256()
        for file in files:
            try:
                columns, rows = _layout(file)
            except (OSError, pa.ArrowException) as error:
                raise UserError(f"--from '{file}' cannot be read ({error}).") from error
            self._image = _column(file, columns, image_column, IMAGE_COLUMNS, "--image-column")
            self._caption = _column(file, columns, caption_column, CAPTION_COLUMNS, "--caption-column")
            self._groups += [(file, group) for group in range(len(rows))]
            sizes += rows
            found.update(f"{file.name} {file.stat().st_size} {rows}\n".encode())
        self._ends = list(accumulate(sizes))
        if not self._ends or not self._ends[-1]:
            raise UserError(f"--from '{files[0]}' holds no row.")
        self.fingerprint = found.hexdigest()[:16]
        self._open: tuple[int, pa.Table] | None = None

    def __len__(self) -> int:
        """See `ImageSource`."""
        return self._ends[-1]

    def read(self, index: int) -> SourceSample:
        """See `ImageSource`."""
        group = bisect_right(self._ends, index)
        if self._open is None or self._open[0] != group:
            self._open = group, _read(*self._groups[group])
        start = self._ends[group - 1] if group else 0
        row: dict[str, Any] = self._open[1].slice(index - start, 1).to_pylist()[0]
        file = self._groups[group][0]
        image, caption = row.pop(self._image), row.pop(self._caption)
        # A number that is none (nan) has no place in JSON.
        fields = {name: one for name, one in row.items() if isinstance(one, str | int | float) and one == one}
        where = f"{file}, row {index - start}"
        try:
            return SourceSample(where, _bytes(image, file.parent), caption, fields)
        except (SampleFaultError, OSError) as error:
            raise SampleFaultError(f"{where}: {error}") from error


def _layout(file: Path) -> tuple[list[str], list[int]]:
    """Names of the columns, and rows of each group that is read at once."""
    if file.suffix.lower() != ".parquet":
        table = _read(file, 0)
        return table.column_names, [table.num_rows]
    opened = pq.ParquetFile(file)
    metadata = opened.metadata
    groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    return opened.schema_arrow.names, groups


def _read(file: Path, group: int) -> pa.Table:
    if file.suffix.lower() == ".parquet":
        return pq.ParquetFile(file).read_row_group(group)
    # Captions with line breaks in quotes are common; without this they would be torn apart.
    parse = pyarrow.csv.ParseOptions(
        delimiter="\t" if file.suffix.lower() == ".tsv" else ",", newlines_in_values=True
    )
    return pyarrow.csv.read_csv(file, parse_options=parse)


def _column(file: Path, columns: Sequence[str], named: str | None, usual: Sequence[str], option: str) -> str:
    candidates: Iterator[str] = (one for one in ((named,) if named else usual) if one in columns)
    chosen = next(candidates, None)
    if chosen is None:
        wanted = f"no column '{named}'" if named else f"none of the columns {', '.join(usual)}"
        raise UserError(f"--from '{file}' has {wanted}; name one of {', '.join(columns)} with {option}.")
    return chosen


def _bytes(image: Any, folder: Path) -> bytes:
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, bytes):
        return image
    if not isinstance(image, str) or not image:
        raise SampleFaultError("there is no image in this row")
    if "://" in image:
        raise SampleFaultError(
            f"'{image}' is to be downloaded first; img2dataset makes tars of a table of addresses"
        )
    path = folder / image
    if not path.is_file():
        raise SampleFaultError(f"there is no file '{path}'")
    return path.read_bytes()
