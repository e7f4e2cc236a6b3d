"""Prompts from the file that a user has: COCO's annotations, a list of lines, a CSV or parquet table."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from sdxs_lightning.core.errors import UserError
from sdxs_lightning.core.seeding import Stream, uniform

CAPTION_COLUMNS = ("caption", "text", "prompt", "TEXT")
NAME_COLUMNS = ("file_name", "filename", "image", "key", "__key__", "image_id")
DRAW_SEED = 2014
"""Of the subset of COCO's images; a smaller subset is the beginning of a larger one."""


@dataclass(frozen=True)
class PromptList:
    """Captions in their order, with the image that each belongs to where the file says so."""

    captions: tuple[str, ...]
    names: tuple[str, ...] | None = None
    """File name or key of the image, for each caption."""
    origin: str = "list"
    """`list`: in published order. `coco`: one an image, the one with the smallest annotation id, by image id."""

    def selection(self, count: int | None, source: str) -> PromptList:
        """What a protocol of `count` samples uses: the first of a list; of COCO's images a seeded subset.

        Args:
            count: how many; None takes all.
            source: the file, for the message.

        Raises:
            UserError: where there are fewer.
        """
        if count is None or count == len(self.captions):
            return self
        if count > len(self.captions):
            raise UserError(
                f"the protocol asks for {count} prompts, but '{source}' has {len(self.captions)}; give the whole file, or "
                f"--samples {len(self.captions)}, which is another protocol hash."
            )
        chosen = list(range(count))
        if self.origin == "coco":
            order = uniform(DRAW_SEED, Stream.EVALUATION, torch.arange(len(self.captions)))
            chosen = order.argsort(stable=True)[:count].tolist()
        names = None if self.names is None else tuple(self.names[i] for i in chosen)
        return PromptList(tuple(self.captions[i] for i in chosen), names, self.origin)

    def of_images(self, image_names: Sequence[str], source: str) -> list[str]:
        """The caption of each image, by name where the file has names of these images, otherwise by position.

        Images that are numbered rather than named as COCO's stand in the order of the selection of as many prompts. A name
        matches without its folder and its ending, so that a PNG finds the caption of COCO's JPEG.

        Raises:
            UserError: for an image without a caption, or another number of captions than images.
        """
        if self.names is not None:
            by_name = {_stem(name): caption for name, caption in zip(self.names, self.captions, strict=True)}
            missing = [name for name in image_names if _stem(name) not in by_name]
            if not missing:
                return [by_name[_stem(name)] for name in image_names]
            if len(missing) < len(image_names):
                raise UserError(
                    f"'{source}' has no caption for {len(missing)} of {len(image_names)} images, the first of them "
                    f"'{missing[0]}'; its names have to be those of the images."
                )
        if self.origin == "coco" and len(self.captions) > len(image_names):
            return list(self.selection(len(image_names), source).captions)
        if len(self.captions) != len(image_names):
            raise UserError(
                f"{len(image_names)} images and {len(self.captions)} captions in '{source}'; give one caption an image, in "
                "the order of the images' names, or a table with the images' names."
            )
        return list(self.captions)

    def digest(self) -> str:
        """16 hex digits over the captions, in whatever order: that of images in a folder is not that of their prompts."""
        return captions_digest(self.captions)


def captions_digest(captions: Sequence[str]) -> str:
    """16 hex digits over captions, in whatever order."""
    return hashlib.sha256("\n".join(sorted(captions)).encode()).hexdigest()[:16]


def read_prompts(path: str | Path) -> PromptList:
    """Reads a file of captions by its ending: .json (COCO annotations or a list), .txt, .csv, .tsv, .parquet.

    Raises:
        UserError: for a file that is not there, not readable as what its ending says, or has a caption without words.
    """
    path = Path(path)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(
            f"--captions '{path}' ends in '{path.suffix}'; it takes {', '.join(_READERS)} (COCO's captions_val2014.json is "
            "one)."
        )
    try:
        found = reader(path)
    except FileNotFoundError:
        raise UserError(f"--captions '{path}': there is no such file.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--captions '{path}' cannot be read as {path.suffix[1:]} ({error}).") from error
    empty = next((i for i, caption in enumerate(found.captions) if not caption.strip()), None)
    if empty is not None or not found.captions:
        what = "holds no caption" if empty is None else f"has a caption without words (number {empty + 1})"
        raise UserError(f"--captions '{path}' {what}; correct the file.")
    return found


def _coco(annotations: Mapping[str, Any]) -> PromptList:
    """One caption an image: by image id, the one with the smallest annotation id."""
    files = {int(image["id"]): str(image["file_name"]) for image in annotations["images"]}
    first: dict[int, tuple[int, str]] = {}
    for one in annotations["annotations"]:
        candidate = (int(one["id"]), " ".join(str(one["caption"]).split()))
        image_id = int(one["image_id"])
        first[image_id] = min(first.get(image_id, candidate), candidate)
    ids = sorted(first)
    return PromptList(
        tuple(first[number][1] for number in ids), tuple(files[number] for number in ids), "coco"
    )


def _json(path: Path) -> PromptList:
    content = json.loads(path.read_text(encoding="utf-8-sig"))
    if isinstance(content, dict) and "annotations" in content:
        return _coco(content)
    if not isinstance(content, list):
        raise ValueError("neither a list nor COCO's `images` and `annotations`")
    if all(isinstance(one, str) for one in content):
        return PromptList(tuple(content))
    return _table(content)


def _text(path: Path) -> PromptList:
    lines = path.read_text(encoding="utf-8-sig").splitlines()
    return PromptList(tuple(line.strip() for line in lines if line.strip()))


def _csv(path: Path) -> PromptList:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return _table(list(csv.DictReader(file, dialect="excel-tab" if path.suffix == ".tsv" else "excel")))


def _parquet(path: Path) -> PromptList:
    import pyarrow.parquet as parquet

    return _table(parquet.read_table(path).to_pylist())


def _table(rows: Sequence[Mapping[str, Any]]) -> PromptList:
    if not rows:
        return PromptList(())
    caption = next((name for name in CAPTION_COLUMNS if name in rows[0]), None)
    if caption is None:
        raise ValueError(f"no column named {', '.join(CAPTION_COLUMNS)}, but {', '.join(map(str, rows[0]))}")
    name = next((name for name in NAME_COLUMNS if name in rows[0]), None)
    names = None if name is None else tuple(str(row[name]) for row in rows)
    return PromptList(tuple(str(row[caption] or "").strip() for row in rows), names)


def _stem(name: str) -> str:
    return PurePosixPath(name).stem


_READERS: dict[str, Callable[[Path], PromptList]] = {
    ".json": _json,
    ".txt": _text,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
}
