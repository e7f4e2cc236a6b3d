"""Prompts for pairs: lines of a text file, captions of shards, or the toy world."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, get_args

from data.shards.dataset import ShardDataset
from data.shards.index import ShardSet
from data.shards.order.sample_order import SampleOrder
from data.toy import world
from sdxs_lightning.core.errors import UserError


class Prompts(Protocol):
    """Prompts by index, the same ones on every machine."""

    size: int | None
    """Number of prompts; None: unlimited."""
    fingerprint: str
    """Fingerprint of all prompts."""

    def at(self, indices: Sequence[int]) -> list[str]:
        """The prompts of these pairs; repeated if there are fewer prompts than pairs."""


class TextPrompts:
    """The lines of a UTF-8 file that are not blank, in order.

    Args:
        path: of the file.

    Raises:
        UserError: for a file that does not exist, is not UTF-8, holds no prompt, or whose name says that lines are not prompts.
    """

    def __init__(self, path: Path) -> None:
        if path.suffix.lower() not in ("", ".txt"):
            raise UserError(
                f"--captions '{path}' ends in '{path.suffix}', and each of its lines would be a prompt, brackets and commas "
                "too; write the prompts into a .txt file, one per line."
            )
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--captions '{path}' cannot be read as UTF-8 text ({error}).") from error
        # Not splitlines, which also splits at U+2028 and similar characters inside a prompt.
        self._lines = [line for line in map(str.strip, text.split("\n")) if line]
        if "\0" in text:
            raise UserError(f"--captions '{path}' holds zero bytes, which a damaged file does and no text.")
        if not self._lines:
            raise UserError(f"--captions '{path}' holds no prompt; write one per line.")
        self.size: int | None = len(self._lines)
        self.fingerprint = hashlib.sha256("\n".join(self._lines).encode()).hexdigest()[:16]

    def at(self, indices: Sequence[int]) -> list[str]:
        return [self._lines[index % len(self._lines)] for index in indices]


class ShardPrompts:
    """The captions of shards in stored order; other members are not read.

    Args:
        shards: a folder, a glob or a brace pattern.

    Raises:
        UserError: for shards that are missing, broken, or lack a caption.
    """

    def __init__(self, shards: str) -> None:
        try:
            found = ShardSet.open(shards)
            order = SampleOrder(found.sizes, shuffle_window_shards=0)
            self._dataset = ShardDataset(found, order, contents=(), empty_captions="keep")
        except (OSError, ValueError) as error:
            raise UserError(f"--captions '{shards}': {error}") from error
        self.size: int | None = len(self._dataset)
        self.fingerprint = found.fingerprint

    def at(self, indices: Sequence[int]) -> list[str]:
        return self._dataset.batch([index % len(self._dataset) for index in indices]).captions


class ToyPrompts:
    """The captions of a split of the toy world.

    Args:
        split: its name.

    Raises:
        UserError: for a split that the toy world does not have.
    """

    def __init__(self, split: str) -> None:
        if split not in get_args(world.Split):
            raise UserError(
                f"--captions 'toy:{split}' is not a split of the toy world; it has "
                f"{', '.join(f'toy:{name}' for name in get_args(world.Split))}."
            )
        self._split: world.Split = split  # type: ignore[assignment]
        self.size: int | None = None
        self.fingerprint = f"toy:{split}"

    def at(self, indices: Sequence[int]) -> list[str]:
        return [world.captions(self._split, 1, index)[0] for index in indices]


def open_prompts(named: str) -> Prompts:
    """Opens what `--captions` names.

    Args:
        named: "toy:SPLIT"; a text file with one prompt a line; or a folder, glob or brace pattern of shards.

    Raises:
        UserError: if it is none of these.
    """
    if named.startswith("toy:"):
        return ToyPrompts(named.removeprefix("toy:"))
    path = Path(named)
    if path.is_file() and path.suffix != ".tar":
        return TextPrompts(path)
    return ShardPrompts(named)
