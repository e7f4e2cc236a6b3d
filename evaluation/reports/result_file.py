"""Writing a result's JSON file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


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
