"""A launcher that starts another number of processes than the configuration asks for: one sentence, before anything waits."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sdxs_lightning.cli import main
from sdxs_lightning.core.errors import UserError
from sdxs_lightning.run_start import check_process_count
from tests.helpers.tiny_run import tiny_config, write_config


def trainer_of(external: bool, started: int, nodes: int, devices: int) -> Any:
    environment = SimpleNamespace(creates_processes_externally=external, world_size=lambda: started)
    connector = SimpleNamespace(cluster_environment=environment)
    return SimpleNamespace(_accelerator_connector=connector, num_nodes=nodes, num_devices=devices)


@pytest.mark.parametrize(("started", "nodes", "devices"), [(1, 2, 8), (8, 2, 8), (16, 1, 8), (3, 1, 2)])
def test_a_wrong_number_of_tasks_is_one_sentence(started: int, nodes: int, devices: int) -> None:
    with pytest.raises(UserError) as refused:
        check_process_count(trainer_of(True, started, nodes, devices))
    said = str(refused.value)
    assert f"the launcher started {started} processes" in said
    assert f"trainer.num_nodes {nodes} x trainer.devices {devices} are {nodes * devices}" in said
    assert "--ntasks-per-node" in said and said.endswith("or change trainer.num_nodes and trainer.devices.")


def test_the_right_number_and_lightnings_own_processes_pass() -> None:
    check_process_count(trainer_of(True, 16, 2, 8))
    check_process_count(trainer_of(False, 1, 1, 8))


@pytest.mark.parametrize(
    "variables",
    [
        {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "3", "RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0"},
        {
            "SLURM_NTASKS": "3",
            "SLURM_JOB_NAME": "job",
            "SLURM_PROCID": "0",
            "SLURM_LOCALID": "0",
            "SLURM_NODEID": "0",
        },
    ],
    ids=["torchrun", "srun"],
)
def test_real_launchers(
    variables: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    file = write_config(tmp_path / "tiny.yaml", tiny_config(tmp_path))
    assert main(["--config", str(file)]) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error")]
    assert len(lines) == 1 and "3" in lines[0]
    assert not (tmp_path / "run").exists()
