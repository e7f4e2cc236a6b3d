"""Reading prompts: COCO annotations, common prompt sets, text files, tables.

Supported as published: PartiPrompts.tsv, MJHQ-30K's meta_data.json, GenEval's evaluation_metadata.jsonl, DrawBench.csv and
HPSv2's json files (one per style, or a single one).
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation.images.image_sets import check_links, natural_order
from evaluation.images.prompt_list import NAME_COLUMNS, PromptList
from sdxs_lightning.core.errors import UserError
from sdxs_lightning.core.unique_keys import unique_keys

CAPTION_COLUMNS = ("caption", "text", "prompt", "prompts")
"""Column names, case-insensitive."""
CATEGORY_COLUMNS = ("category", "tag", "style")
_COLUMNS = (*CAPTION_COLUMNS, *NAME_COLUMNS, *CATEGORY_COLUMNS)


def read_prompts(path: str | Path) -> PromptList:
    """Read captions from a file (.json, .txt, .jsonl, .csv, .tsv, .parquet) or a folder of .txt files.

    Raises:
        UserError: if the file is missing, cannot be parsed, or has an empty caption.
    """
    path = Path(path)
    reader = _folder if path.is_dir() else _READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(
            f"--captions '{path}' ends in '{path.suffix}'; it takes {', '.join(_READERS)} (COCO's captions_val2014.json is "
            "one)."
        )
    try:
        found = reader(path)
    except FileNotFoundError:
        raise UserError(f"--captions '{path}': there is no such file.") from None
    except Exception as error:  # parsers raise many types: csv.Error, RecursionError, pyarrow's, ...
        raise UserError(
            f"--captions '{path}' cannot be read as {path.suffix[1:] or 'a folder'} ({error})."
        ) from error
    problem = _problem(found.captions)
    if problem is not None:
        raise UserError(f"--captions '{path}' {problem}; correct the file.")
    return found


def _problem(captions: Sequence[str]) -> str | None:
    for number, caption in enumerate(captions, start=1):
        if not caption.strip():
            return f"has a caption without words (number {number})"
        if "\0" in caption:
            return f"holds zero characters in caption number {number}, which a damaged file does and no text"
        try:
            caption.encode()
        except UnicodeEncodeError:  # JSON's "\\ud800" alone, for which tokenizers raise a TypeError
            return f"has half of a surrogate pair in caption number {number}, which is no character"
    return None if captions else "holds no caption"


def _words(value: Any) -> str:
    """A caption of a table; None is one without words.

    Raises:
        ValueError: for a list of captions, a number or anything else, of which str() would make a caption that nobody wrote.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"a caption is {value!r:.60}, but must be a string; write one row a caption")
    return value


def _coco(annotations: Mapping[str, Any]) -> PromptList:
    """One caption per image, that with the smallest annotation id, sorted by image id."""
    files: dict[int, str] = {}
    for image in annotations["images"]:
        name = str(image["file_name"])
        if files.setdefault(_whole(image["id"]), name) != name:
            raise ValueError(f"two images have the id {image['id']}: {files[image['id']]} and {name}")
    first: dict[int, tuple[int, str]] = {}
    for one in annotations["annotations"]:
        candidate = (_whole(one["id"]), " ".join(_words(one["caption"]).split()))
        image_id = _whole(one["image_id"])
        first[image_id] = min(first.get(image_id, candidate), candidate)
    ids = sorted(first)
    return PromptList(
        tuple(first[number][1] for number in ids), tuple(files[number] for number in ids), "coco"
    )


def _whole(value: Any) -> int:
    """An id of COCO, which some tools write as text."""
    number = int(value)
    if isinstance(value, float) and number != value:
        raise ValueError(f"an id is {value}, but must be a whole number")
    return number


def _json(path: Path) -> PromptList:
    content = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=unique_keys)
    if isinstance(content, dict) and "annotations" in content:
        return _coco(content)
    if isinstance(content, dict) and content:
        values = list(content.values())
        if all(isinstance(value, dict) for value in values):  # MJHQ-30K: by image key
            return _table([{"key": key, **value} for key, value in content.items()])
        if all(isinstance(value, list) for value in values):  # HPSv2: lists by style
            rows = [(style, prompt) for style, prompts in content.items() for prompt in prompts]
            return _listed([prompt for _, prompt in rows], tuple(style for style, _ in rows))
    if not isinstance(content, list):
        raise ValueError("neither a list nor COCO's 'images' and 'annotations'")
    return _listed(content)


def _listed(content: Sequence[Any], categories: tuple[str, ...] | None = None) -> PromptList:
    if all(isinstance(one, str) for one in content):
        return PromptList(tuple(content), categories=categories)
    return _table(content)


def _json_lines(path: Path) -> PromptList:
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    return _listed([json.loads(line, object_pairs_hook=unique_keys) for line in lines if line.strip()])


def _text(path: Path) -> PromptList:
    # Not splitlines, which also splits at U+2028 and similar characters inside a caption and would shift later captions.
    # Empty lines between captions are refused rather than skipped for the same reason.
    lines = path.read_text(encoding="utf-8-sig").rstrip().split("\n")
    return PromptList(tuple(line.strip() for line in lines if lines != [""]))


def _is_visible(file: Path, folder: Path) -> bool:
    return file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts)


def _folder(path: Path) -> PromptList:
    """One prompt per .txt file, as in DPG-Bench."""
    # Without hidden files, as for images: macOS writes `._name.txt` beside each on foreign disks.
    visible = [file for file in path.rglob("*") if file.suffix.lower() == ".txt" and _is_visible(file, path)]
    files = sorted(visible, key=lambda file: natural_order(file.name))
    check_links(files, path)
    below = next((file for file in files if file.parent != path), None)
    if below is not None:
        raise ValueError(f"'{below}' is in a folder below; give a folder that holds its prompts itself")
    texts = tuple(file.read_text(encoding="utf-8-sig").strip() for file in files)
    return PromptList(texts, tuple(file.stem for file in files))


def _csv(path: Path) -> PromptList:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.reader(file, strict=True))
    return _table(_rows(rows))


def _tsv(path: Path) -> PromptList:
    """Read a .tsv without quoting: PartiPrompts has unquoted fields that begin with a quotation mark."""
    content = path.read_text(encoding="utf-8-sig").replace("\r\n", "\n")
    lines = [line.split("\t") for line in content.split("\n") if line]
    if any(len(line) != len(lines[0]) for line in lines):
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = list(csv.reader(file, dialect="excel-tab", strict=True))
    else:
        lines = [[_unquoted(cell) for cell in line] for line in lines]
    return _table(_rows(lines))


def _unquoted(cell: str) -> str:
    inner = cell[1:-1]
    quoted = len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if quoted else cell


def _rows(lines: Sequence[Sequence[str]]) -> list[dict[str, str]]:
    """Rows as dicts with the header's column names.

    Raises:
        ValueError: for a row whose number of cells differs from the header's.
    """
    if not lines:
        return []
    header, *rows = lines
    cells = Counter(name.strip().lower() for name in header)
    twice = next((name for name, count in cells.items() if count > 1 and name in _COLUMNS), None)
    if twice is not None:
        raise ValueError(f"two columns are called {twice}")
    for number, row in enumerate(rows, start=2):
        if row and len(row) != len(header):
            raise ValueError(f"row {number} has {len(row)} cells, the header {len(header)}")
    return [dict(zip(header, row, strict=True)) for row in rows if row]


def _parquet(path: Path) -> PromptList:
    import pyarrow.parquet as parquet

    return _table(parquet.read_table(path).to_pylist())


def _table(rows: Sequence[Mapping[str, Any]]) -> PromptList:
    if not rows:
        return PromptList(())
    caption = _column(rows[0], CAPTION_COLUMNS)
    if caption is None:
        raise ValueError(f"no column named {', '.join(CAPTION_COLUMNS)}, but {', '.join(map(str, rows[0]))}")
    name, category = _column(rows[0], NAME_COLUMNS), _column(rows[0], CATEGORY_COLUMNS)
    named = [] if name is None else [found for row in rows if (found := _name(row[name], name)) is not None]
    names = tuple(named) if named else None
    if named and len(named) < len(rows):
        raise ValueError(f"{len(rows) - len(named)} of {len(rows)} rows have no {name}")
    return PromptList(
        tuple(_words(row[caption]).strip() for row in rows),
        names,
        categories=None if category is None else tuple(str(row.get(category) or "none") for row in rows),
        records=tuple(rows),
    )


def _name(value: Any, column: str) -> str | None:
    """The name of an image in a table; None where there is none, as in HPSv2, whose image_path lists the compared images.

    A table that holds the images themselves has their bytes, and perhaps their path beside them.

    Raises:
        ValueError: for a number with a fraction, as tables with a gap have in place of ids.
    """
    if isinstance(value, Mapping):
        value = value.get("path")
    if value is None or isinstance(value, list | bytes):
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(f"a {column} is {value!r:.60}, but must be a string or a whole number")
    return str(value)


def _column(row: Mapping[str, Any], wanted: Sequence[str]) -> str | None:
    """The first wanted column in the table, case-insensitive."""
    there = {str(name).strip().lower(): name for name in reversed(list(row))}
    return next((there[name] for name in wanted if name in there), None)


_READERS: dict[str, Callable[[Path], PromptList]] = {
    ".json": _json,
    ".txt": _text,
    ".jsonl": _json_lines,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
}
