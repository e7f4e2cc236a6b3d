"""What the manuals show is executed: the library's README, block by block, in a folder of its own."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from sdxs_lightning.cli import main
from tests.helpers.tiny_run import ROOT, tiny_config

BLOCK = re.compile(r"^```(\w+)(?: file=(\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks() -> list[tuple[str, str, str]]:
    """Language, file name or "", text of each fenced block."""
    return [
        (language, file, text)
        for language, file, text in BLOCK.findall((ROOT / "sdxs_lightning" / "README.md").read_text())
    ]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the files of the manual are, importable, with the toy world's data beside them."""
    (tmp_path / "data").symlink_to(ROOT / "data")
    for _, file, text in blocks():
        if file:
            (tmp_path / file).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for file in ("score_sampling", "styled", "saturation"):
        monkeypatch.delitem(sys.modules, file, raising=False)
    return tmp_path


def test_python_blocks_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    for language, file, text in blocks():
        if language == "python" and not file:
            exec(text, names)
    images = names["images"]
    assert tuple(images.shape) == (2, 3, 32, 32)
    assert float(names["loss"].detach()) > 1e-4
    share = ((images <= -1 + 1 / 255) | (images >= 1 - 1 / 255)).double().mean().item()
    found = names["metric"].estimates()["saturated_pixels"]
    assert (found.value, found.samples) == (pytest.approx(share, abs=1e-3), 2)
    assert "Estimate(value=" in capsys.readouterr().out


@pytest.mark.parametrize("overlay", ["sds.yaml", "styled.yaml"])
def test_overlays_train(folder: Path, overlay: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(folder, max_student_updates=2)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))
    files = ["--config", "tiny.yaml", "--config", overlay]
    assert main(files) == 2
    module = overlay.replace("sds.yaml", "score_sampling.yaml").removesuffix(".yaml")
    assert capsys.readouterr().err.rstrip().endswith(f"add --trust {module}")
    assert f"--config {overlay} --trust {module}" in (ROOT / "sdxs_lightning" / "README.md").read_text()
    assert main([*files, "--trust", module]) == 0
