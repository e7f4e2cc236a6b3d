"""The settings of a set, stored beside its shards: a set is resumed with the same settings or refused."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from data.prepare.common.set_folder import SetFolder
from sdxs_lightning.core.errors import CheckpointNotWritten, UserError


def begin_or_resume(
    folder: SetFolder, file_name: str, settings: Mapping[str, Any], names_only: Collection[str] = ()
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
        CheckpointNotWritten: for a folder that cannot be written.
    """
    now: dict[str, Any] = json.loads(json.dumps(settings))
    try:
        # Listed first: another command writes the settings before any shard.
        holds_shards = any(name.endswith(".tar") for name in folder.names())
        before = _read(folder, file_name)
        if before is None:
            if holds_shards:
                raise UserError(
                    f"--out '{folder}' holds shards but no {file_name}, so this command did not begin it; give another folder."
                )
            # Of several commands that start at once, one creates it.
            if folder.create(file_name, json_content(now)):
                return
            before = _read(folder, file_name)
    except OSError as error:
        raise CheckpointNotWritten(f"--out '{folder}' cannot be written: {error}.") from error
    assert before is not None
    for name in now:
        if name not in names_only and before.get(name) != now[name]:
            raise UserError(
                f"--out '{folder}' was started with {name} {before.get(name)!r} and this command says {now[name]!r}: "
                "give what it was started with to resume it, or another folder."
            )


def _read(folder: SetFolder, file_name: str) -> dict[str, Any] | None:
    content = folder.read(file_name)
    if content is None:
        return None
    try:
        before: dict[str, Any] = json.loads(content)
    except ValueError as error:
        raise UserError(
            f"'{folder.location(file_name)}' cannot be read ({error}); remove the folder or give another --out."
        ) from error
    return before


def json_content(content: Mapping[str, Any]) -> bytes:
    """A JSON file."""
    return f"{json.dumps(content, indent=2)}\n".encode()


def write_text(file: Path, content: str) -> None:
    """Writes a UTF-8 file atomically."""
    with tempfile.NamedTemporaryFile(
        "w", dir=file.parent, prefix=f".{file.name}-", delete=False, encoding="utf-8"
    ) as stream:
        stream.write(content)
    os.chmod(stream.name, 0o644)
    os.replace(stream.name, file)
