"""Tiny students, made once for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.students import KINDS, save_student

Students = Callable[[str], Path]


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory) -> Students:
    """The folder of a student of KINDS; do not write to it."""
    root = tmp_path_factory.mktemp("students")

    def folder(name: str) -> Path:
        if not (root / name).is_dir():
            save_student(root, name, **KINDS[name])  # type: ignore[arg-type]
        return root / name

    return folder
