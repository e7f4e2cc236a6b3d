"""Judges shared by the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from evaluation.features import FrozenClip
from tests.evaluation.judges import write_clip


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random CLIP in open_clip's local layout."""
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def clip(clip_folder: Path) -> FrozenClip:
    """The same, loaded."""
    return FrozenClip(clip_folder)
