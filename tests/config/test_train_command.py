"""The training command before torch is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sdxs_lightning.train_command import OPTIONS, help_text, main

ROOT = Path(__file__).resolve().parents[2]


def test_help_names_every_option_of_the_command_line_itself() -> None:
    source = (ROOT / "sdxs_lightning" / "cli.py").read_text()
    own = {line.strip().strip('",') for line in source.splitlines() if line.strip().startswith('"--')}
    added = {name.partition('"')[0] for name in own if "=" not in name and " " not in name.partition('"')[0]}
    assert added and added <= set(OPTIONS)
    assert all(name in help_text() for name in OPTIONS)
    assert all(len(line) <= 128 for line in help_text().splitlines())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no configuration: give --config"),
        (["--ckpt_pth", "last"], "--ckpt_pth is not an option (did you mean --ckpt_path?)"),
        (["--config", "nowhere.yaml"], "there is no file 'nowhere.yaml'"),
        (["--config", "nowhere.yaml", "--ckpt-path", "last"], "there is no file 'nowhere.yaml'"),
        (
            ["--config", "configs/sd15/distill_gan.yaml"],
            "is not set in configs/sd15/distill_gan.yaml; an overlay",
        ),
        (["--config", "configs"], "'configs' cannot be read: Is a directory"),
        (["--config", "configs/quickstart.yaml", "--data"], "--data needs a value"),
        (["--trainer.max_steps", "--plan"], "--trainer.max_steps needs a value"),
        (
            ["--config", "configs/quickstart.yaml", "--trainer", "null"],
            "trainer is null (set on the command line)",
        ),
        (["--config", "configs/quickstart.yaml", "--data=null"], "data is null (set on the command line)"),
        (
            ["--model.class_path=evaluation.report.Report"],
            "is called evaluation.callbacks.run_report.Report now",
        ),
    ],
)
def test_what_is_refused_at_once(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_help_and_refusals_import_no_torch_and_print_config_no_diffusers() -> None:
    script = """
import sys
from sdxs_lightning.train_command import main
assert main(["--help"]) == 0
assert main(["--config", "configs/quickstart.yaml", "--no_such_option"]) == 2
assert main(["--config", "nowhere.yaml"]) == 2
print(sorted({"torch", "lightning", "diffusers", "transformers"} & set(sys.modules)))
try:
    main(["--config", "configs/quickstart.yaml", "--print_config"])
except SystemExit as exit:
    assert exit.code in (0, None)
print(sorted({"diffusers", "peft"} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[0] != done.stdout.splitlines()[-1]  # help, the configuration
    assert done.stdout.splitlines().count("[]") == 2
