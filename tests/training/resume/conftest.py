"""The run that the tests of this folder resume, trained once per session."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdxs_lightning.cli import main
from tests.helpers.resumed_run import ADAM, SCHEDULE, Change
from tests.helpers.tiny_run import tiny_config, write_config


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run of two student updates, with a checkpoint at each."""
    folder = tmp_path_factory.mktemp("trained")
    config = tiny_config(folder, max_student_updates=2)
    config["trainer"]["callbacks"][1]["init_args"]["every_n_student_updates"] = 1
    for role in ("student", "fake_score"):
        settings = {"optimizer": copy.deepcopy(ADAM), "lr_scheduler": copy.deepcopy(SCHEDULE)}
        config["model"]["init_args"][role]["init_args"] |= settings
    assert main(["--config", str(write_config(folder / "tiny.yaml", config))]) == 0
    return folder, config


@pytest.fixture
def resume(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Resumes a copy of the run, to three updates, after a change; returns exit code and what it said."""
    folder, config = trained
    shutil.copytree(folder / "run", tmp_path / "run")
    shutil.copytree(folder / "sd-epsilon", tmp_path / "base")

    def call(change: Change | None = None, *arguments: str, updates: int = 3) -> tuple[int, str]:
        changed = copy.deepcopy(config)
        changed["trainer"]["default_root_dir"] = str(tmp_path / "run")
        model = changed["model"]["init_args"]
        model["family"]["init_args"]["base"] = str(tmp_path / "base")
        model["update_schedule"]["max_student_updates"] = updates
        if change is not None:
            change(changed)
        file = write_config(tmp_path / "tiny.yaml", changed)
        code = main(["--config", str(file), "--ckpt_path", *(arguments or ("last",))])
        said = capfd.readouterr().err
        assert "Traceback" not in said
        return code, said

    return call
