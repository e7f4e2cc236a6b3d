"""Each mistake: one sentence that says what came, what is accepted and where to change it, and its exit code."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sdxs_lightning.cli import main
from sdxs_lightning.stages.distillation.step import OneStepDistillation
from tests.helpers.tiny_distillation import save_base
from tests.helpers.tiny_run import tiny_config, write_config

Change = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    tiny_config(path)
    return path


@pytest.fixture
def run(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs the command line on the tiny configuration after a change; returns exit code and the error line."""

    def call(change: Change | None = None, *arguments: str, **update_schedule: int) -> tuple[int, str]:
        config = tiny_config(folder, **update_schedule)
        config["trainer"]["default_root_dir"] = str(tmp_path / "run")
        if change is not None:
            change(config)
        file = write_config(tmp_path / "tiny.yaml", config)
        code = main(["--config", str(file), *arguments])
        errors = capfd.readouterr().err
        assert "Traceback" not in errors
        lines = [line for line in errors.splitlines() if line.startswith(("error: ", "stopped: "))]
        assert len(lines) <= 1, errors
        return code, lines[0] if lines else ""

    return call


def model(config: dict[str, Any]) -> dict[str, Any]:
    arguments: dict[str, Any] = config["model"]["init_args"]
    return arguments


def _set(path: str, value: Any) -> Change:
    def change(config: dict[str, Any]) -> None:
        *parents, name = path.split(".")
        node: Any = config
        for part in parents:
            node = node[int(part)] if part.isdigit() else node[part]
        node[name] = value

    return change


WRONG_SETTINGS: dict[str, tuple[Change | None, tuple[str, ...], list[str]]] = {
    "unknown flag": (
        None,
        ("--trainer.max_epoch", "3"),
        ["--trainer.max_epoch is not an option", "did you mean --trainer.max_epochs?"],
    ),
    "unknown key of the trainer": (
        _set("trainer.max_epoch", 3),
        (),
        ["trainer.max_epoch is not an option", "did you mean max_epochs?", "tiny.yaml, line "],
    ),
    "unknown top-level key": (
        _set("trainr", {"devices": 1}),
        (),
        ["trainr.devices is not an option", "did you mean trainer"],
    ),
    "unknown key of the model": (
        _set("model.init_args.ema_deca", 0.5),
        (),
        [
            "model.init_args.ema_deca is not an option",
            "did you mean ema_decay?",
            "tiny.yaml, line ",
            "update_schedule",
        ],
    ),
    "unknown key of a nested class": (
        _set("model.init_args.student.init_args.weight", "x"),
        (),
        ["student", "weight is not an option", "did you mean weights?", "gradient_checkpointing"],
    ),
    "unknown key of an optimizer": (
        _set("model.init_args.student.init_args.optimizer.init_args.lrr", 1),
        (),
        ["lrr is not an option", "did you mean lr?"],
    ),
    "unknown key of a grouped value": (
        _set("model.init_args.update_schedule.max_updates", 1),
        (),
        [
            "update_schedule.max_updates is not an option",
            "did you mean max_student_updates?",
            "warmup_updates",
        ],
    ),
    "unknown key of a callback": (
        _set("trainer.callbacks.1.init_args.every", 1),
        (),
        ["every is not an option", "every_n_student_updates"],
    ),
    "wrong type in the file": (
        _set("model.init_args.ema_decay", "much"),
        (),
        ["model.init_args.ema_decay is 'much'", "float is accepted", "tiny.yaml, line "],
    ),
    "wrong type on the command line": (
        None,
        ("--data.init_args.batch_size", "many"),
        ["batch_size is 'many'", "int is accepted", "on the command line"],
    ),
    "wrong type of the trainer": (
        _set("trainer.max_epochs", "abc"),
        (),
        ["trainer.max_epochs is 'abc'", "int or null is accepted"],
    ),
    "a value out of range": (
        _set("model.init_args.update_schedule.fake_score_updates_per_student_update", 0),
        (),
        ["fake_score_updates_per_student_update must be 1 or more, got 0"],
    ),
    "parts that do not go together": (
        _set("model.init_args.distribution_matching", None),
        (),
        ["the student has no objective", "set distribution_matching"],
    ),
    "unknown class": (
        _set("data.class_path", "data.shards.datamodule.ShardData"),
        (),
        ["data.shards.datamodule.ShardData", "has no attribute"],
    ),
    "an interpolation of nothing": (
        _set("model.init_args.seed", "${sed_everything}"),
        (),
        ["sed_everything", "model.init_args.seed"],
    ),
    "a class that a setting does not take": (
        _set("model.init_args.distribution_matching", {"class_path": "torch.nn.Linear"}),
        (),
        [
            "model.init_args.distribution_matching (set in ",
            "torch.nn.Linear does not correspond to a subclass of DistributionMatching",
        ],
    ),
    "a class of another kind": (
        _set("model.init_args.student", {"class_path": "torch.nn.Linear"}),
        (),
        [
            "model.init_args.student (set in ",
            "torch.nn.Linear",
            "not correspond to a subclass of StudentGenerator",
        ],
    ),
    "an argument that is missing": (
        _set("model.init_args.student", None),
        (),
        ["model.init_args.student is null, but StudentGenerator is accepted (set in ", "tiny.yaml, line "],
    ),
    "a wrong value on the command line": (
        None,
        ("--data.batch_size", "abc"),
        ["data.init_args.batch_size is 'abc', but int is accepted (set on the command line)"],
    ),
    "another class on the command line": (
        None,
        ("--data.class_path", "torch.nn.Linear"),
        ["data (set on the command line)", "not correspond to a subclass of LightningDataModule"],
    ),
    "an option of earlier versions": (
        _set("model.init_args.curriculum", {"critic_updates_per_student_update": 1}),
        (),
        [
            "curriculum is called update_schedule now",
            "critic_updates_per_student_update is called fake_score_updates_per_student_update now",
            "tiny.yaml, line ",
        ],
    ),
    "missing file": (None, ("--config", "nowhere.yaml"), ["there is no file", "nowhere.yaml"]),
}


@pytest.mark.parametrize("name", list(WRONG_SETTINGS))
def test_a_wrong_setting_is_reported_in_one_sentence(run: Callable[..., tuple[int, str]], name: str) -> None:
    change, arguments, expected = WRONG_SETTINGS[name]
    code, said = run(change, *arguments)
    print(said)
    assert code == 2
    for words in expected:
        assert words in said


def test_a_file_that_is_no_yaml(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text("trainer: {devices: [1\nmodel: x\n")
    assert main(["--config", str(file)]) == 2
    said = capfd.readouterr().err
    assert "error: " in said
    assert "broken.yaml is not valid YAML" in said
    assert "line 2" in said


def test_a_missing_base_folder(run: Callable[..., tuple[int, str]]) -> None:
    code, said = run(_set("model.init_args.family.init_args.base", "models/none"))
    assert code == 2
    assert "there is no folder 'models/none'; give a diffusers folder" in said
    assert "'models/none' is model.init_args.family.init_args.base, set in " in said
    assert re.search(r"tiny.yaml, line \d+\.$", said)


def test_a_base_of_another_family(run: Callable[..., tuple[int, str]], folder: Path) -> None:
    sdxl = save_base("sdxl-epsilon", folder)
    code, said = run(_set("model.init_args.family.init_args.base", str(sdxl)))
    assert code == 2
    assert "StableDiffusionXLPipeline, and this family needs a StableDiffusionPipeline" in said


def test_missing_shards(run: Callable[..., tuple[int, str]]) -> None:
    code, said = run(_set("data.init_args.shards", "datasets/none"))
    assert code == 2
    assert "'datasets/none' is data.init_args.shards, set in " in said


def test_a_run_folder_that_cannot_be_written(run: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    # A file where the folder should be: root, as whom these tests may run, may write everywhere else.
    (tmp_path / "run").write_text("in the way")
    code, said = run()
    assert code == 2
    assert "cannot be written (" in said
    assert "give another one as --trainer.default_root_dir" in said


def test_a_checkpoint_folder_that_cannot_be_written(
    run: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("in the way")
    code, said = run()
    assert code == 2
    assert "checkpoints cannot be written to" in said


def test_last_without_a_checkpoint(run: Callable[..., tuple[int, str]]) -> None:
    code, said = run(None, "--ckpt_path", "last")
    assert code == 2
    assert "found none; use --ckpt_path auto to begin a new run" in said


def test_a_second_run_in_the_same_folder_is_refused(
    run: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    assert run(None, max_student_updates=2) == (0, "")
    code, said = run(None, max_student_updates=2)
    assert code == 2
    assert "holds checkpoints of an earlier run (newest: update_00000002-batch_00000002)" in said
    assert "--ckpt_path auto or last" in said
    over = _set("trainer.callbacks.1.init_args.start_over", True)
    assert run(over, max_student_updates=1) == (0, "")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [
        "update_00000001-batch_00000001"
    ]


@pytest.mark.parametrize("network", ["student", "fake_score"])
def test_nan_names_step_network_and_last_good_checkpoint(
    run: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: str
) -> None:
    step = OneStepDistillation.training_step

    def poisoned(self: OneStepDistillation, batch: Any, batch_idx: int) -> None:
        if self.iterations == 3:
            with torch.no_grad():
                next(self.networks[network].parameters()).fill_(float("nan"))
        step(self, batch, batch_idx)

    monkeypatch.setattr(OneStepDistillation, "training_step", poisoned)
    code, said = run(None, max_student_updates=9)
    assert code == 3
    assert "the training diverged: " in said
    assert network in said
    assert "since iteration 4" in said or "at student update 4" in said
    assert f"the last good checkpoint is {tmp_path}/run/checkpoints/update_00000002-batch_00000002" in said


def test_nan_weights_are_not_saved_over_good_ones(
    run: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of the last step was finite, the update was not."""
    step = OneStepDistillation.training_step

    def poisoned(self: OneStepDistillation, batch: Any, batch_idx: int) -> None:
        step(self, batch, batch_idx)
        if self.iterations == 4:
            with torch.no_grad():
                assert self.fake_score is not None
                next(self.fake_score.parameters()).fill_(float("inf"))

    monkeypatch.setattr(OneStepDistillation, "training_step", poisoned)
    code, said = run()
    assert code == 3
    assert "weights of the fake_score are NaN or infinite at student update 4" in said
    assert "the last good checkpoint is" in said
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [
        "update_00000002-batch_00000002"
    ]
