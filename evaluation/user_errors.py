"""Conversion of file and value errors to one-line command errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sdxs_lightning.core.errors import UserError


@contextmanager
def as_user_errors() -> Iterator[None]:
    """Convert OSError and ValueError to UserError; a context manager and decorator.

    Raises:
        UserError: with the text of the error.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from error
