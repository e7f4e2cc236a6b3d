"""Reading and writing a result's JSON file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_result(path: Path) -> dict[str, Any]:
    """The content of a JSON file.

    Raises:
        ValueError: if it is not a JSON object.
    """
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a score file: its JSON is not an object")
    return content


def check_writable(path: Path) -> None:
    """Raises OSError unless `write_result` can write there: before what it is to hold is measured."""
    if path.is_dir():
        raise IsADirectoryError(f"'{path}' is a folder; give a file.")
    if path.exists() and not path.is_file():
        return
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.touch()
    partial.unlink()


def write_result(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file and its folder; the file is whole or not there, and an earlier one stays until it is.

    What a link names is replaced, not the link; a device or a pipe, such as /dev/stdout, is written to.

    Raises:
        OSError: if it cannot be written.
    """
    text = json.dumps(content, indent=2) + "\n"
    if path.exists() and not path.is_file():
        path.write_text(text)
        return
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_text(text)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
