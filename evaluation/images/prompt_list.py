"""Captions of images: which caption is an image's, by name or by position."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import torch

from data.shards.images import SUFFIXES
from sdxs_lightning.core.errors import UserError
from sdxs_lightning.core.seeding import Stream, uniform

NAME_COLUMNS = ("file_name", "filename", "image", "key", "__key__", "image_id", "image_path")
DRAW_SEED = 2014
"""Seed of the subset of COCO images; a smaller subset is a prefix of a larger one."""


@dataclass(frozen=True)
class PromptList:
    """Captions in order, with the metadata of each."""

    captions: tuple[str, ...]
    names: tuple[str, ...] | None = None
    """File name or key of each caption's image."""
    origin: str = "list"
    """`list`: in file order. `coco`: one caption per image, that with the smallest annotation id, sorted by image id."""
    categories: tuple[str, ...] | None = None
    """Category of each caption, if any: PartiPrompts' Category, GenEval's tag, HPSv2's style."""
    records: tuple[Mapping[str, Any], ...] | None = None
    """Rows of a table or JSON Lines file, for the metadata files that GenEval reads beside images."""

    def selection(self, count: int | None, source: str) -> PromptList:
        """Select `count` prompts: the first of a list, or a seeded subset of COCO.

        Args:
            count: number of prompts; None takes all.
            source: the file, for messages.

        Raises:
            UserError: if there are fewer.
        """
        if count is None or count == len(self.captions):
            return self
        if count > len(self.captions):
            raise UserError(
                f"the protocol asks for {count} prompts, but '{source}' has {len(self.captions)}; give the complete file, or "
                f"--samples {len(self.captions)}, which has another protocol hash."
            )
        chosen = list(range(count))
        if self.origin == "coco":
            order = uniform(DRAW_SEED, Stream.EVALUATION, torch.arange(len(self.captions)))
            chosen = order.argsort(stable=True)[:count].tolist()
        return self._at(chosen)

    def of_images(self, image_names: Sequence[str], source: str) -> list[str]:
        """The caption of each image; arguments as in `for_images`."""
        return list(self.for_images(image_names, source).captions)

    def for_images(self, image_names: Sequence[str], source: str) -> PromptList:
        """The entry of each image, matched by name if the file has names, by position otherwise.

        A name matches by its relative path without extension (a PNG matches the caption of COCO's JPEG), then by its file name
        if unambiguous, then, for COCO, by the image id. Images numbered from 0 or 1 correspond to COCO's selection of as many
        prompts.

        Raises:
            UserError: for an image with no or several captions, or different numbers of captions and images.
        """
        if self.names is not None:
            if self.origin == "coco" and _are_counted(image_names) and not self._shares_names(image_names):
                return self.selection(len(image_names), source)
            matched = self._by_name(image_names, source)
            if matched is not None:
                return self._at(matched)
            raise UserError(
                f"none of the names in '{source}' (the first is '{self.names[0]}') is that of an image (the first is "
                f"'{image_names[0]}'); give a table with the images' names, or a list of captions in the images' order."
            )
        if len(self.captions) != len(image_names):
            raise UserError(
                f"{len(image_names)} images and {len(self.captions)} captions in '{source}'; give one caption an image, in "
                "the order of the images' names, or a table with the images' names."
            )
        column = self._column_in_another_order(image_names)
        if column is not None:
            raise UserError(
                f"the column '{column}' of '{source}' has the images' names in another order than theirs, in which captions "
                f"without names are taken; call the column {NAME_COLUMNS[0]}, or leave it out."
            )
        return self

    def digest(self) -> str:
        """16-digit hex hash of the captions in order."""
        return captions_digest(self.captions)

    def _by_name(self, image_names: Sequence[str], source: str) -> list[int] | None:
        """Index of each image's caption; None if no name matches."""
        assert self.names is not None
        key = _file_name if self._shares_names(image_names) else _image_id
        by_path, by_file = _places(self.names, without_ending), _places(self.names, key)
        found, missing = [], []
        for name in image_names:
            places = by_path.get(without_ending(name)) or by_file.get(key(name) or "", [])
            if len(places) > 1:
                raise UserError(
                    f"'{source}' has {len(places)} captions for '{name}' (rows {places[0] + 1} and {places[1] + 1}); write "
                    "paths relative to the folder of the images into it, each once."
                )
            found += places
            missing += [] if places else [name]
        if not found:
            return None
        if missing:
            raise UserError(
                f"'{source}' has no caption for {len(missing)} of {len(image_names)} images, the first of them "
                f"'{missing[0]}'; its names must be those of the images."
            )
        if len(set(found)) < len(found):
            row = next(place for place, count in Counter(found).items() if count > 1)
            raise UserError(
                f"several images are called '{self.names[row]}', so that '{source}' does not tell their captions apart; write "
                "paths relative to the folder of the images into it."
            )
        return found

    def _column_in_another_order(self, image_names: Sequence[str]) -> str | None:
        """A column of the table that holds most of the images' names, not called like one, and not in their order."""
        numbers = {_file_name(name): number for number, name in enumerate(image_names)}
        for column in self.records[0] if self.records else ():
            values = [record.get(column) for record in self.records or ()]
            named = [_file_name(str(value)) if isinstance(value, str | int) else "" for value in values]
            found = [(row, numbers[name]) for row, name in enumerate(named) if name in numbers]
            # Most of them, each once: a column of small counts is no list of the images 0.png, 1.png, ...
            if len({number for _, number in found}) > len(image_names) // 2 and any(
                row != number for row, number in found
            ):
                return str(column)
        return None

    def _shares_names(self, image_names: Sequence[str]) -> bool:
        """Whether to compare file names rather than COCO image ids."""
        assert self.names is not None
        held = {_file_name(name) for name in self.names}
        return self.origin != "coco" or any(_file_name(name) in held for name in image_names)

    def _at(self, positions: Sequence[int]) -> PromptList:
        def picked(values: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
            return None if values is None else tuple(values[position] for position in positions)

        captions = picked(self.captions) or ()
        return PromptList(
            captions, picked(self.names), self.origin, picked(self.categories), picked(self.records)
        )


def captions_digest(captions: Sequence[str]) -> str:
    """16-digit hex hash of captions in order, since CLIP score depends on the pairing with images."""
    return hashlib.sha256(json.dumps(list(captions)).encode()).hexdigest()[:16]


def _places(names: Sequence[str], key: Callable[[str], str | None]) -> dict[str, list[int]]:
    """Positions by key, for names with a key."""
    places: dict[str, list[int]] = {}
    for position, name in enumerate(names):
        if (found := key(name)) is not None:
            places.setdefault(found, []).append(position)
    return places


def without_ending(name: str) -> str:
    """The path without image extension."""
    path = PurePosixPath(name)
    return (path.with_suffix("") if path.suffix.lower() in SUFFIXES else path).as_posix()


def _file_name(name: str) -> str:
    return PurePosixPath(without_ending(name)).name


def _image_id(name: str) -> str | None:
    """The number at the end of a COCO file name, without leading zeros."""
    digits = _file_name(name).rpartition("_")[2]
    return str(int(digits)) if digits.isascii() and digits.isdigit() else None


def _are_counted(names: Sequence[str]) -> bool:
    """Whether the images are named 0, 1, 2, ... or 1, 2, 3, ..., with or without leading zeros."""
    stems = [_file_name(name) for name in names]
    if not all(stem.isascii() and stem.isdigit() for stem in stems):
        return False
    numbers = [int(stem) for stem in stems]
    return numbers == list(range(numbers[0], numbers[0] + len(numbers))) and numbers[0] in (0, 1)
