"""What a configuration may run: classes of others, code loaders of torch and shell commands need `--trust`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import Namespace

from sdxs_lightning.cli import _build, main
from sdxs_lightning.config_files import read_arguments
from sdxs_lightning.core.errors import UserError
from sdxs_lightning.environment_values import EnvironmentValues
from sdxs_lightning.train_command import main as train
from sdxs_lightning.trust import CODE_LOADERS, TRUSTED, Trust
from tests.helpers.tiny_run import tiny_config, write_config

TOY_BASE = Path(__file__).resolve().parents[2] / "data" / "toy" / "base"
EVIL = "from pathlib import Path\nPath('ran').touch()\nimport lightning.pytorch as pl\nclass Evil(pl.Callback):\n    pass\n"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return tiny_config(tmp_path_factory.mktemp("tiny"), max_student_updates=1)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Working folder with an importable `evil.py` that leaves the file `ran` when it is imported."""
    (tmp_path / "evil.py").write_text(EVIL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "evil", raising=False)
    return tmp_path


def run(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = train(arguments)
    return code, capfd.readouterr().err


IN_A_FILE: dict[str, tuple[dict[str, Any], str]] = {
    "callback": (
        {"trainer": {"callbacks": [{"class_path": "evil.Evil"}]}},
        "trainer.callbacks.0.class_path is 'evil.Evil' (set in overlay.yaml, line 3)",
    ),
    "name alone": ({"trainer": {"callbacks": ["evil.Evil"]}}, "'evil.Evil'"),
    "below an option": (
        {"model": {"init_args": {"objectives": {"x": {"class_path": "evil.Evil"}}}}},
        "model.init_args.objectives.x.class_path is 'evil.Evil'",
    ),
    "replaced class": ({"model": {"class_path": "evil.Evil"}}, "model.class_path is 'evil.Evil'"),
    "function": (
        {"model": {"init_args": {"student": {"init_args": {"optimizer": "evil.Evil"}}}}},
        "'evil.Evil'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", IN_A_FILE)
def test_a_foreign_class_is_not_imported_unasked(
    case: str, plain: dict[str, Any], folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    overlay, message = IN_A_FILE[case]
    write_config(folder / "tiny.yaml", plain)
    (folder / "overlay.yaml").write_text(yaml.safe_dump(overlay, sort_keys=False))
    code, errors = run(capfd, "--config", "tiny.yaml", "--config", "overlay.yaml", "--print_config")
    assert code == 2
    assert not (folder / "ran").exists()
    assert message in errors and errors.rstrip().endswith("add --trust evil")


@pytest.mark.parametrize(
    "flags",
    [
        ("--trainer.callbacks=evil.Evil",),
        ("--trainer.callbacks+=evil.Evil",),
        ("--model.student.optimizer", "evil.Evil"),
        ("--trainer.logger.class_path=evil.Evil",),
        ("--trainer.callbacks.help", "evil.Evil"),
    ],
)
def test_nor_is_one_of_a_flag(
    flags: tuple[str, ...], plain: dict[str, Any], folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, errors = run(capfd, "--config", str(write_config(folder / "tiny.yaml", plain)), *flags)
    assert code == 2
    assert not (folder / "ran").exists()
    assert errors.rstrip().endswith("add --trust evil")


@pytest.mark.parametrize(
    "trust", [("--trust", "evil"), ("--trust=other,evil",), ("--trust", "o", "--trust", "evil.Evil")]
)
def test_a_trusted_one_is(trust: tuple[str, ...], plain: dict[str, Any], folder: Path) -> None:
    write_config(folder / "tiny.yaml", plain)
    (folder / "overlay.yaml").write_text("trainer: {callbacks+: [{class_path: evil.Evil}]}")
    files = ("--config", "tiny.yaml", "--config", "overlay.yaml")
    cli = _build([*files, *trust])
    callbacks: list[object] = cli.trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
    assert "Evil" in [type(callback).__name__ for callback in callbacks]
    with pytest.raises(UserError, match="add --trust evil"):  # of this process, but not of this command line
        _build(files)


def test_a_name_that_is_put_together_is_refused(
    plain: dict[str, Any], folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = plain | {"trainer": plain["trainer"] | {"default_root_dir": "evil.Evil"}}
    config["trainer"]["callbacks"] = [{"class_path": "${trainer.default_root_dir}"}]
    code, errors = run(capfd, "--config", str(write_config(folder / "tiny.yaml", config)))
    assert code == 2 and "trainer.callbacks" in errors
    assert not (folder / "ran").exists()


def test_a_file_cannot_trust_itself(
    plain: dict[str, Any], folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = plain | {"trust": "evil"}
    code, errors = run(capfd, "--config", str(write_config(folder / "tiny.yaml", config)))
    assert code == 2 and "trust is not an option" in errors


def test_what_loads_code_is_refused_below_trusted_packages_too() -> None:
    trust = Trust.of(["my.package,torch.jit.ScriptModule"])
    assert all(trust.allows(f"{name}.sub.Class") for name in (*TRUSTED, "my.package"))
    assert not any(trust.allows(name) or trust.allows(f"{name}.f") for name in CODE_LOADERS)
    assert not any(
        map(trust.allows, ("my.Class", "torchvision.x", "os.system", "my.packages.X", "dataset.X"))
    )
    assert trust.allows("torch.jit.ScriptModule") and trust.allows("torch.optim.AdamW")


@pytest.mark.parametrize("value", ["a b", "", "*", "a..b", "jsonargparse", "--config"])
def test_trust_names_modules(value: str, capfd: pytest.CaptureFixture[str]) -> None:
    code, errors = run(capfd, "--config", "configs/quickstart.yaml", "--trust", value)
    assert code == 2 and errors.startswith("error: --trust ")


@pytest.mark.parametrize("text", ["pipe:touch ran; cat s.tar", "${model.class_path}"])
def test_a_command_for_a_shard_does_not_run_unasked(
    text: str, plain: dict[str, Any], folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shards = {"class_path": "data.shards.datamodule.ShardDataModule"}
    config = plain | {
        "data": shards | {"init_args": {"batch_size": 2, "cache_folder": "cache", "shards": [text]}}
    }
    if text.startswith("$"):
        config["data"]["init_args"] |= {
            "shards": ["${data.init_args.index_folder}:touch ran"],
            "index_folder": "pipe",
        }
    write_config(folder / "tiny.yaml", config)
    assert main(["--config", "tiny.yaml"]) == 2
    assert not (folder / "ran").exists()
    errors = capfd.readouterr().err
    assert "are a shell command; to let it run, add --trust pipe:" in errors
    assert main(["--config", "tiny.yaml", "--trust", "pipe:"]) == 2  # it makes no tar
    assert (folder / "ran").exists()


@pytest.mark.parametrize("command", ["verify", "latents", "images"])
def test_nor_for_the_commands_that_prepare(
    command: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from data.prepare.__main__ import main as prepare

    location, out = "pipe:touch ran; cat no.tar", ("--out", "made")
    arguments = {
        "verify": ("verify", location),
        "latents": ("latents", "--from", location, "--model", str(TOY_BASE), *out),
        "images": ("images", "--from", location, *out),
    }[command]
    with pytest.raises(SystemExit) as stop:
        prepare([*arguments, "--cache_folder", "cache"])
    assert stop.value.code == 2
    assert not (folder / "ran").exists()
    assert "are a shell command; to let it run, add --trust pipe:" in capsys.readouterr().err


@pytest.mark.parametrize("base", [None, [{"class_path": "a.B"}]])
@pytest.mark.parametrize("by_flag", [False, True])
def test_an_appended_list_keeps_values_of_the_environment_as_written(
    monkeypatch: pytest.MonkeyPatch, base: list[Any] | None, by_flag: bool
) -> None:
    monkeypatch.setenv("RUN_TOKEN", "hunter2hunter2")
    added = {"class_path": "a.Notify", "init_args": {"token": "${oc.env:RUN_TOKEN}"}}
    settings = {"trainer": {} if base is None else {"callbacks": base}}
    arguments = ["--config", json.dumps(settings)]
    if by_flag:
        arguments += [f"--trainer.callbacks+={json.dumps(added)}"]
    else:
        arguments += ["--config", json.dumps({"trainer": {"callbacks+": [added]}})]
    token = Namespace(token="hunter2hunter2")
    parsed = [*(Namespace(one) for one in base or []), Namespace(class_path="a.Notify", init_args=token)]
    config = Namespace(trainer=Namespace(callbacks=parsed))
    written = EnvironmentValues(read_arguments(arguments)).as_written(config)
    assert written.trainer.callbacks[-1].init_args.token == "${oc.env:RUN_TOKEN}"
    assert "hunter2" not in str(written)


def test_values_of_the_environment_are_saved_as_written(
    plain: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RUN_TOKEN", "hunter2hunter2")
    monkeypatch.setenv("RUN_FOLDER", str(folder / "run"))
    monkeypatch.setenv("UPDATES", "1")
    monkeypatch.setenv("RATE", "1e-3")
    config = plain | {"trainer": plain["trainer"] | {"default_root_dir": "${oc.env:RUN_FOLDER}"}}
    config["trainer"]["logger"] = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {
            "save_dir": "${trainer.default_root_dir}",
            "name": "logs",
            "prefix": "${oc.env:RUN_TOKEN}",
        },
    }
    file = str(write_config(folder / "tiny.yaml", config))
    flags = [
        "--model.update_schedule.max_student_updates",
        "${oc.env:UPDATES}",
        "--model.student.optimizer.lr=${oc.env:RATE}",
    ]
    with pytest.raises(SystemExit):
        train(["--config", file, *flags, "--print_config"])
    assert "hunter2" not in capfd.readouterr().out
    assert train(["--config", file, *flags]) == 0
    saved = yaml.safe_load((folder / "run" / "config.yaml").read_text())
    assert saved["trainer"]["default_root_dir"] == "${oc.env:RUN_FOLDER}"
    assert saved["trainer"]["logger"]["init_args"]["save_dir"] == "${trainer.default_root_dir}"
    assert saved["trainer"]["logger"]["init_args"]["prefix"] == "${oc.env:RUN_TOKEN}"
    assert saved["model"]["init_args"]["update_schedule"]["max_student_updates"] == "${oc.env:UPDATES}"
    assert (
        saved["model"]["init_args"]["student"]["init_args"]["optimizer"]["init_args"]["lr"]
        == "${oc.env:RATE}"
    )
    with_secret = [
        path
        for path in (folder / "run").rglob("*")
        if path.is_file() and path.name != "metrics.csv" and b"hunter2" in path.read_bytes()
    ]
    assert with_secret == []
    # What was saved is a configuration again.
    assert (
        train(["--config", str(folder / "run" / "config.yaml"), "--trainer.default_root_dir", "again"]) == 0
    )
    code, errors = run(capfd, "--config", file, "--seed_everything=${oc.env:RUN_TOKEN}")
    assert code == 2 and "hunter2" not in errors and "${oc.env:RUN_TOKEN}" in errors
