"""The table of U-Nets in a base's place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evaluation.benchmarks.unet_table import main
from tests.helpers.tiny import tiny_sd_unet


def run(world: Path, out: Path, *more: str) -> dict[str, Any]:
    main(["--base", str(world / "sd-epsilon"), "--steps", "2", "--out", str(out), *more])
    stored: dict[str, Any] = json.loads(out.read_text())
    return stored


def test_rows_of_the_base_and_of_another(world: Path, toy_networks: dict[str, str], tmp_path: Path) -> None:
    tiny_sd_unet(seed=5).save_pretrained(tmp_path / "other")
    same = world / "sd-epsilon" / "unet"
    out = tmp_path / "results" / "table.json"
    rows = run(world, out, "--unet", f"same={same}", f"other={tmp_path / 'other'}")["rows"]
    assert list(rows) == ["base", "same", "other"]
    assert rows["same"]["steps"]["2"]["fid"] == rows["base"]["steps"]["2"]["fid"]
    assert rows["other"]["steps"]["2"]["fid"] != rows["base"]["steps"]["2"]["fid"]
    assert rows["other"]["parameters"] == sum(p.numel() for p in tiny_sd_unet().parameters())

    # What the file holds for the same weights stays; other weights under an old name are measured.
    stored = json.loads(out.read_text())
    stored["rows"]["base"]["steps"]["2"]["fid"] = stored["rows"]["other"]["steps"]["2"]["fid"] = 77.0
    out.write_text(json.dumps(stored))
    again = run(world, out, "--unet", f"other={same}")["rows"]
    assert again["base"]["steps"]["2"]["fid"] == 77.0
    assert again["other"]["steps"]["2"]["fid"] == rows["base"]["steps"]["2"]["fid"]


def test_what_it_refuses(world: Path, toy_networks: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--unet takes name=folder, .* and got 'folder'"):
        run(world, tmp_path / "out.json", "--unet", "folder")
    with pytest.raises(SystemExit, match="unet_table: .*nowhere"):
        main(["--base", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out.json")])
