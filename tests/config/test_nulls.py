"""null, or a list, where a type does not accept it: one sentence, and no value of None."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sdxs_lightning.cli import main
from tests.helpers.tiny_run import ROOT, tiny_config, write_config


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return tiny_config(tmp_path_factory.mktemp("tiny"), max_student_updates=1)


@pytest.mark.parametrize(
    ("key", "accepted"),
    [
        ("data.batch_size", "int"),
        ("data.init_args.seed", "int"),  # of `**settings`
        ("data.shards", "str | list[str]"),
        ("model.seed", "int"),
        ("model.update_schedule.max_student_updates", "int"),  # of a dataclass
        ("model.family.base", "str"),
        ("model.ema_decay", "float"),
        ("trainer.max_steps", "int"),
    ],
)
@pytest.mark.parametrize("plan", [False, True])
def test_null_is_refused_where_it_is_no_value(
    key: str,
    accepted: str,
    plan: bool,
    plain: dict[str, Any],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    config = plain | {"trainer": plain["trainer"] | {"default_root_dir": str(tmp_path / "run")}}
    file = str(write_config(tmp_path / "tiny.yaml", config))
    arguments = ["--config", file, f"--{key}=null", *(["--plan"] if plan else [])]
    assert main(arguments) == 2
    errors = capfd.readouterr().err
    assert f"is null, but {accepted} is accepted (set on the command line)." in errors
    assert "Traceback" not in errors and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--model.denoising.timesteps", "[0, 999]"],
            "denoising.init_args.timesteps is [0, 999], but a mapping with low, high is accepted (set on the command line)",
        ),
        (
            ["--model.pairs", "[1]"],
            "model.init_args.pairs (set on the command line) takes a mapping with the options of PairSettings, or the",
        ),
        (
            ["--model.fake_score.lora", "x"],
            "lora is 'x', but LoRA or null is accepted (set on the command line)",
        ),
        (
            [
                "--model.distribution_matching.timesteps",
                "{low: 0.5}",
            ],  # the quickstart's files set another `low`
            "timesteps.low is '0.5', but int is accepted (set on the command line)",
        ),
        (
            ["--model.pairs.count", "null", "--plan"],
            "model.init_args.pairs.count is null, but int is accepted",
        ),
        (["--data.train_images", "null"], "data.init_args.train_images is null, but int is accepted"),
    ],
)
def test_of_the_quickstart(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["--config", "configs/quickstart.yaml", *arguments]) == 2
    assert message in capfd.readouterr().err


def test_null_stays_where_it_is_a_value(plain: dict[str, Any], tmp_path: Path) -> None:
    config = plain | {"trainer": plain["trainer"] | {"default_root_dir": str(tmp_path / "run")}}
    file = str(write_config(tmp_path / "tiny.yaml", config))
    nulls = ("model.discriminator", "model.pairs", "data.contents", "data.val_shards", "trainer.precision")
    assert main(["--config", file, *(f"--{key}=null" for key in nulls)]) == 0
