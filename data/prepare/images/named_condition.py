"""What `--condition` names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from data.conditions import Canny, Depth, ImageCondition, Sketch, SoftEdge
from sdxs_lightning.core.errors import UserError

NAMES = "canny, soft_edge, sketch, depth:MODEL, given:FOLDER"
GIVEN = "given:"
_PLAIN: dict[str, Callable[[], ImageCondition]] = {"canny": Canny, "soft_edge": SoftEdge, "sketch": Sketch}


def open_condition(named: str, device: str = "cpu") -> ImageCondition:
    """The condition of a name, with its default settings.

    Args:
        named: one of NAMES but `given`.
        device: where a network runs.

    Raises:
        UserError: for another name.
    """
    kind, colon, model = named.partition(":")
    if kind in _PLAIN and not colon:
        return _PLAIN[kind]()
    if kind == "depth" and model:
        return Depth(model, device)
    raise UserError(f"--condition '{named}' is none of {NAMES}.")


def given_folder(named: str | None) -> Path | None:
    """The folder of `given:FOLDER`, None for other names.

    Raises:
        UserError: for a folder that is not there.
    """
    if named is None or not named.startswith(GIVEN):
        return None
    folder = Path(named.removeprefix(GIVEN))
    if not folder.is_dir():
        raise UserError(f"--condition '{named}': there is no folder '{folder}'.")
    return folder
