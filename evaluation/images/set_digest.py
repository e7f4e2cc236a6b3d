"""Digest of a set of images: of their names and contents, wherever they are stored."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterable, Sequence


def checksum(content: bytes) -> str:
    """Size and CRC-32, as zip files store them for their members."""
    return f"{len(content)} {zlib.crc32(content):08x}"


def digest_of(names: Sequence[str], states: Iterable[str]) -> str:
    """16-digit hex hash of names without their common parent folders, so that `val2014.zip` equals the folder `val2014`."""
    common = len(os.path.commonpath([os.path.dirname(name) for name in names])) if names else 0
    lines = [f"{name[common:].lstrip('/')} {state}" for name, state in zip(names, states, strict=True)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
