"""The settings of a set, stored beside its shards: a set is resumed with the same settings or refused."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from sdxs_lightning.core.errors import CheckpointNotWritten, UserError


def begin_or_resume(
    folder: Path, file_name: str, settings: Mapping[str, Any], names_only: Collection[str] = ()
) -> None:
    """Writes the settings into a new folder, or compares them with those that the set was started with.

    Args:
        folder: of the set, created if it is missing.
        file_name: of the settings in it.
        settings: values that JSON can hold.
        names_only: settings that say how an input was named and are not compared: a moved folder is the same input as long
            as the fingerprints agree.

    Raises:
        UserError: for a set with other settings, or shards without any.
    """
    file = folder / file_name
    now: dict[str, Any] = json.loads(json.dumps(settings))
    before = _read(file)
    if before is None:
        if any(folder.glob("*.tar")):
            raise UserError(
                f"--out '{folder}' holds shards but no {file_name}, so this command did not begin it; give another folder."
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(file, now)
        except OSError as error:
            raise CheckpointNotWritten(f"--out '{folder}' cannot be written: {error}.") from error
        return
    for name in now:
        if name not in names_only and before.get(name) != now[name]:
            raise UserError(
                f"--out '{folder}' was started with {name} {before.get(name)!r} and this command says {now[name]!r}: "
                "give what it was started with to resume it, or another folder."
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


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file atomically."""
    write_text(file, json.dumps(content, indent=2) + "\n")


def write_text(file: Path, content: str) -> None:
    """Writes a UTF-8 file atomically."""
    with tempfile.NamedTemporaryFile(
        "w", dir=file.parent, prefix=f".{file.name}-", delete=False, encoding="utf-8"
    ) as stream:
        stream.write(content)
    os.chmod(stream.name, 0o644)
    os.replace(stream.name, file)
