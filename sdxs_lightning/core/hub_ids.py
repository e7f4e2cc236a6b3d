"""Telling ids of the Hugging Face hub from paths, which have the same form."""

from __future__ import annotations

import re
from pathlib import Path

_PART = r"[A-Za-z0-9_](?:[\w.-]*[A-Za-z0-9_])?"
HUB_ID = re.compile(rf"(?P<repo>{_PART}/{_PART})(@(?P<revision>[\w./-]+))?", re.ASCII)

PATHS = ("models", "outputs")
"""First folders of the paths in the shipped configurations: they are none on the hub before they exist here."""


def is_hub_id(name: str) -> bool:
    """Whether a name that is no file or folder here is meant for the hub: `org/name` or `org/name@revision`.

    A path such as `../missing` or `./model` is none, and neither is `runs/missing` where there is a folder `runs`, nor
    `models/missing` anywhere: a mistyped path must not be looked for, or found, elsewhere. `org/name@main` means the hub in
    any case.
    """
    match = HUB_ID.fullmatch(name)
    if match is None or "--" in match["repo"] or ".." in match["repo"] or match["repo"].endswith(".git"):
        return False
    path = Path(name)
    return match["revision"] is not None or not (path.parts[0] in PATHS or path.parent.is_dir())
