"""What a set was made of, kept beside its shards, so that a set is never gone on with in another way."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Collection
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdxs_lightning.core.errors import UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def begin(
    folder: Path, file_name: str, settings: DataclassInstance, names_only: Collection[str] = ()
) -> None:
    """Writes the settings into a new folder, or compares them with those that a set was begun with.

    Args:
        folder: of the set, made if it is missing.
        file_name: of the settings in it.
        settings: a dataclass of what JSON can hold.
        names_only: fields that say how things were named on the command line and are not compared: a moved folder is the
            same set as long as the fingerprints agree.

    Raises:
        UserError: for a set with other settings, or shards without any.
    """
    file = folder / file_name
    now: dict[str, Any] = json.loads(json.dumps(asdict(settings)))
    before = _read(file)
    if before is None:
        if any(folder.glob("*.tar")):
            raise UserError(
                f"--out '{folder}' holds shards and no {file_name}, so they are not of this command; give another folder."
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, now)
        return
    for name in (entry.name for entry in fields(settings) if entry.name not in names_only):
        if before.get(name) != now[name]:
            raise UserError(
                f"--out '{folder}' was begun with {name} {before.get(name)!r} and this command says {now[name]!r}: "
                "give what it was begun with to go on, or another folder."
            )


def _read(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        before: dict[str, Any] = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(
            f"'{file}' cannot be read ({error}); remove the folder or give another --out."
        ) from error
    return before


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file that appears whole or not at all."""
    write_text(file, json.dumps(content, indent=2) + "\n")


def write_text(file: Path, content: str) -> None:
    """Writes a UTF-8 file that appears whole or not at all."""
    with tempfile.NamedTemporaryFile(
        "w", dir=file.parent, prefix=f".{file.name}-", delete=False, encoding="utf-8"
    ) as stream:
        stream.write(content)
    os.chmod(stream.name, 0o644)
    os.replace(stream.name, file)
