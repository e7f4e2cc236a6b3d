"""Bases and shards that the training tests share; written once per session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.tiny_distillation import save_base, save_shards


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of the tiny base of a kind."""
    folder = tmp_path_factory.mktemp("bases")
    return lambda kind: save_base(kind, folder)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of latent shards."""
    return save_shards(tmp_path_factory.mktemp("data") / "shards")
