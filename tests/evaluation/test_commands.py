"""The commands of this package: help and refusals without torch, the list of subcommands, guidance."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from evaluation import evaluate
from evaluation.__main__ import main
from evaluation.benchmarks import throughput
from evaluation.benchmarks.tables import __main__ as tables
from evaluation.evaluate import EvaluateOptions
from sdxs_lightning.command_line import parse_options
from tests.helpers.refusals import refusal

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = "python -m evaluation.evaluate"

LIGHT = """
import sys
from pathlib import Path
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from evaluation import compare, evaluate, latency, reference
from evaluation.__main__ import main
from evaluation.benchmarks import coverage, throughput
from evaluation.benchmarks.tables import __main__ as tables

def ends(main, line, code):
    try:
        with redirect_stdout(StringIO()) as said, redirect_stderr(StringIO()) as refused:
            main(line.split())
        ended = 0
    except SystemExit as stopped:
        ended = stopped.code or 0
    assert ended == code, (line, ended, refused.getvalue())
    assert code or len(said.getvalue()) > 200, line

for command in (evaluate, reference, compare, coverage, latency):
    ends(command.main, "--help", 0)
    ends(command.main, "--no_such_option 3", 2)
for program in (main, tables.main, throughput.main):
    ends(program, "--help", 0)
    ends(program, "nothing", 2)
for name in ("recipes", "unets", "teacher", "decoder", "size_conditioning", "seeds", "paired", "show"):
    ends(tables.main, f"{name} --help", 0)
for name in ("data", "resume", "metrics"):
    ends(throughput.main, f"{name} --help", 0)
for line in ("", "--model a --images b", "--model a --protocol coco", "--model a --metrics is", "--model a --weights x",
             "--model a --weights clip=x", "--model a --guidance_scale 0.5", "--model a --samples 0"):
    ends(evaluate.main, line, 2)
ends(reference.main, "--protocol clean", 2)
heavy = {"torch", "diffusers", "lightning", "transformers", "webdataset", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
"""


def test_help_and_refusals_import_neither_torch_nor_diffusers() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", LIGHT], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "--images a --ray --out b",
            "--ray makes the images of a --model; with --images there is nothing to make",
        ),
        ("--model a --ray", "--ray needs --out or --work on a disk that all nodes of the cluster share"),
        ("--model a --out b --ray --processes 2", "--processes is for one machine"),
        ("--model a --out b --gpus_per_task 1", "--gpus_per_task needs --ray"),
        (
            "--model a --out b --ray --control toy --controlnet c --condition canny",
            "--ray does not go with --control",
        ),
    ],
)
def test_what_does_not_go_with_ray(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refusal(evaluate.main, line.split(), capsys)


def test_the_package_lists_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    said = capsys.readouterr().out
    assert all(f"\n  {name} " in said for name in ("evaluate", "compare", "reference"))
    for program in (tables, throughput):
        program.main([])
        said = capsys.readouterr().out
        assert all(f"\n  {command.name} " in said for command in program.COMMANDS)
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "examples:" in said and "(default: toy)" in said and "torch-fidelity" in said


def test_guidance_of_one_is_none_and_zero_is_read_as_one(capsys: pytest.CaptureFixture[str]) -> None:
    def guidance(*arguments: str) -> float:
        return parse_options(EvaluateOptions, ["--model", "x", *arguments], PROGRAM).guidance_scale

    assert guidance() == guidance("--guidance_scale", "1") == 1.0
    assert capsys.readouterr().err == ""
    assert guidance("--guidance-scale", "0") == 1.0
    assert "--guidance_scale 0 is read as 1" in capsys.readouterr().err
    assert guidance("--guidance_scale=7.5") == 7.5
    said = refusal(main, ["evaluate", "--model", "x", "--guidance_scale", "0.5"], capsys)
    assert said == (
        "evaluation evaluate: --guidance_scale is '0.5', but must be a number from 1 to 100, where 1 means no guidance."
    )


def test_former_option_names_are_accepted(capsys: pytest.CaptureFixture[str]) -> None:
    options = parse_options(EvaluateOptions, ["--model", "x", "--pictures", "3"], PROGRAM)
    assert options.report_images == 3
    assert "--pictures is now called --report_images" in capsys.readouterr().err
