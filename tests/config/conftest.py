"""Plans of a tiny distillation, made once for the tests of both plan files."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdxs_lightning.memory_plan.planner import MemoryPlan, Planner
from tests.helpers.planned import PLANNED, hardware, without_weights
from tests.helpers.tiny_distillation import distillation, save_base


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plan")


@pytest.fixture(scope="session")
def configs(folder: Path) -> dict[str, Path]:
    """Tiny bases of both families, without weights."""
    kinds = "sd-epsilon", "sdxl-epsilon"
    return {
        kind.partition("-")[0]: without_weights(save_base(kind, folder / "whole"), folder) for kind in kinds
    }


@pytest.fixture(scope="session")
def planner(configs: dict[str, Path]) -> Planner:
    """Of a distillation on one GPU with gradient accumulation."""
    return Planner(distillation(configs["sdxl"], **PLANNED), hardware(), 16)


@pytest.fixture(scope="session")
def planned(planner: Planner) -> MemoryPlan:
    return planner.plan()
