"""The manual of using the result: its Python runs, its command lines are accepted."""

from __future__ import annotations

import re
import shlex
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from sdxs_lightning.command_line import parse_options
from tests.helpers.tiny_run import ROOT

PAGE = (ROOT / "sdxs_lightning" / "inference" / "README.md").read_text()
OPTIONS = {
    "sdxs_lightning.generate": "sdxs_lightning.generate.GenerateOptions",
    "sdxs_lightning.demo": "sdxs_lightning.demo.__main__.DemoOptions",
    "sdxs_lightning.export_runtime": "sdxs_lightning.export_runtime.ExportRuntimeOptions",
    "evaluation.latency": "evaluation.latency.LatencyOptions",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").symlink_to(ROOT / "data")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks("python"):
        exec(block, names)
    assert names["image"].size == (32, 32) and tuple(names["images"].shape) == (2, 3, 32, 32)
    assert tuple(names["wide"].shape) == (1, 3, 32, 64) and names["changed"].shape[0] == 1


def test_command_lines_are_accepted() -> None:
    lines = [line for block in blocks("bash") for line in block.splitlines() if "python -m" in line]
    seen = set()
    for line in lines:
        words = shlex.split(line.partition("python -m ")[2])
        module, _, name = OPTIONS[words[0]].rpartition(".")
        parse_options(getattr(import_module(module), name), words[1:])
        seen.add(words[0])
    assert seen == set(OPTIONS)
