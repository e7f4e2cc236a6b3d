"""Checksums of prepared shards: SHA-256 of each file in SHA256SUMS, and CRC-32 of each member in the sample's json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.prepare.common.settings_file import write_text

SUMS_FILE = "SHA256SUMS"
CHECKSUMS_FIELD = "crc32"
"""In the json member: CRC-32 of the sample's other members, by extension. A tar has checksums of its headers only."""


def sums_content(sums: Mapping[str, str]) -> str:
    """A file for `sha256sum --check`: SHA-256 in hexadecimal by file name."""
    return "".join(f"{checksum}  {name}\n" for name, checksum in sums.items())


def write_sums(folder: Path, sums: Mapping[str, str]) -> None:
    """Writes SHA256SUMS of the shards in a folder."""
    write_text(folder / SUMS_FILE, sums_content(sums))


def recorded_sums(folder: Path) -> dict[str, str]:
    """SHA-256 by file name, from SHA256SUMS and the shards' _stats.json files in a folder."""
    found: dict[str, str] = {}
    for stats in folder.glob("*_stats.json"):
        try:
            content: Any = json.loads(stats.read_text())
        except ValueError:
            continue  # img2dataset's may be truncated, and has no checksum anyway
        if isinstance(content, dict) and isinstance(content.get("sha256"), str):
            found[f"{stats.name.removesuffix('_stats.json')}.tar"] = content["sha256"]
    sums = folder / SUMS_FILE
    for line in sums.read_text().splitlines() if sums.is_file() else ():
        checksum, _, name = line.partition("  ")
        found[name] = checksum
    return found
