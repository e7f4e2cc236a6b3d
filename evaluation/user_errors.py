"""Errors of files and values that a command was given, as the one sentence that it ends with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sdxs_lightning.core.errors import UserError


@contextmanager
def as_user_errors() -> Iterator[None]:
    """Turns OSError and ValueError into UserError; for a `with` block, or as a decorator of a command's function.

    Raises:
        UserError: with the text of the error.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from error
