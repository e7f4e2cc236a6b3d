"""Bases and shards that the training tests share; written once per session."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.tiny_distillation import family_of, save_base, save_shards


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of the tiny base of a kind."""
    folder = tmp_path_factory.mktemp("bases")
    return lambda kind: save_base(kind, folder)


@pytest.fixture(scope="session")
def smaller_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The same with two stages: two thirds of the time, for tests that look at no single block."""
    folder = tmp_path_factory.mktemp("smaller_bases")
    return lambda kind: save_base(kind, folder, stages=2)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of latent shards."""
    return save_shards(tmp_path_factory.mktemp("data") / "shards")


@pytest.fixture
def config(base_config: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """The `base_config` of a test file, with a run's folder of its own."""
    changed = copy.deepcopy(base_config)
    changed["trainer"]["default_root_dir"] = str(tmp_path / "run")
    return changed


@pytest.fixture(scope="session")
def pretrained(base: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a ControlNet of the tiny SD base that does something."""
    from sdxs_lightning.networks.controlnet import controlnet_from_unet, save_controlnet

    folder = tmp_path_factory.mktemp("pretrained")
    controlnet = controlnet_from_unet(family_of(base("sd-v_prediction")).load_unet(), (16, 32))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in controlnet.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    save_controlnet(controlnet, folder, torch.float32)
    return folder
