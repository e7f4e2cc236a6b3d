"""A picture with its caption, as a source gives it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


class SampleFaultError(ValueError):
    """A sample that is broken; the message says how."""


@dataclass(frozen=True)
class SourceSample:
    """One sample of a source."""

    where: str
    """Its name in the source, for messages."""
    image: bytes
    """A file in a format that Pillow reads."""
    caption: Any
    """Text; anything else is no caption."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """What else is known of it: the json of a tar's sample, other columns of a table."""
    control: bytes | None = None
    """A condition image that was given with it."""
