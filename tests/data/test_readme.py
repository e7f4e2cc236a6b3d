"""data/README.md and the examples of `--help`: every command line is one that today's parsers accept."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from data.prepare.__main__ import COMMANDS
from data.prepare.images.options import ImageOptions
from data.prepare.latents.options import LatentOptions
from data.prepare.pairs.options import PairOptions
from data.prepare.verify.options import VerifyOptions
from sdxs_lightning.command_line import parse_options

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "data" / "README.md").read_text()
OPTIONS: dict[str, Any] = {
    "images": ImageOptions,
    "latents": LatentOptions,
    "pairs": PairOptions,
    "verify": VerifyOptions,
}


def command_lines(text: str) -> list[str]:
    """Lines that begin with python, or with srun and python, with those that a backslash continues."""
    joined = re.sub(r"\\\n\s*", "", text)
    lines = [line.strip().removeprefix("srun --nodes 8 ") for line in joined.splitlines()]
    return [line for line in lines if line.startswith("python ")]


EXAMPLES = [line for options in OPTIONS.values() for line in command_lines(options.EXAMPLES)]
PREPARE = [line for line in [*command_lines(README), *EXAMPLES] if line.startswith("python -m data.prepare ")]


@pytest.mark.parametrize("line", PREPARE)
def test_command_lines_are_accepted(line: str) -> None:
    name, *arguments = shlex.split(line, comments=True)[3:]
    parse_options(OPTIONS[name], arguments)


def test_every_command_has_an_example_in_both() -> None:
    for lines in (command_lines(README), EXAMPLES):
        named = {line.split()[3] for line in lines if line.startswith("python -m data.prepare ")}
        assert named == {command.name for command in COMMANDS}
    assert len(PREPARE) > 15


def test_files_and_anchors_exist() -> None:
    for path in re.findall(r"`((?:configs|data|evaluation)/[\w./-]+\.\w+)`", README):
        assert (ROOT / path).exists(), path
    anchors = {
        re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-")
        for title in re.findall(r"^## (.+)$", README, re.MULTILINE)
    }
    assert set(re.findall(r"\(#([\w-]+)\)", README)) <= anchors
