"""The GPU command at tiny size on the CPU: every section runs, an earlier file is extended, a failure ends one section."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evaluation.benchmarks.gpu import runner
from evaluation.benchmarks.gpu.options import SECTIONS, GpuOptions, Section
from sdxs_lightning.core.errors import UserError

pytestmark = pytest.mark.timeout(600)


def options(out: Path, **settings: Any) -> GpuOptions:
    return GpuOptions(out=out, device="cpu", tiny=True, minutes=8.0, **settings)


def test_every_section_runs_at_tiny_size(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    table = runner.run(options(out))
    sections = json.loads(out.read_text())["sections"]
    assert list(sections) == list(SECTIONS)
    assert {name: section["status"] for name, section in sections.items()} == dict.fromkeys(
        SECTIONS, "complete"
    )
    failed = [row for section in sections.values() for row in section["rows"] if "error" in row]
    assert failed == []
    rows = sections["distill"]["rows"]
    assert {row["arrangement"] for row in rows} == {"ours", "DMD2's"}
    assert all(row["images_per_second"] > 0 for row in rows)
    # The DMD2 iteration: 10 fake score updates per student update, each pass counted once.
    assert all(row["tflop_per_student_update"] > 0 for row in rows if row["arrangement"] == "ours")
    assert all(f"## {name}: complete" in table for name in SECTIONS)


def test_a_section_that_crashes_or_hangs_ends_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = {
        "no_such": Section("evaluation.benchmarks.gpu.no_such.run", 10, 1),
        "machine": SECTIONS["machine"],
    }
    monkeypatch.setattr(runner, "SECTIONS", broken)
    out = tmp_path / "gpu.json"
    runner.run(options(out))
    sections = json.loads(out.read_text())["sections"]
    assert sections["no_such"]["status"] == "failed with exit code 1"
    assert "ModuleNotFoundError" in sections["no_such"]["error"]
    assert sections["machine"]["status"] == "complete"


def test_a_section_without_time_is_named_and_run_by_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "SECTIONS", {name: SECTIONS[name] for name in ("machine", "attention")})
    out = tmp_path / "gpu.json"
    monkeypatch.setattr(runner, "SHORTEST_SECONDS", 1e9)
    assert "## machine: did not fit" in runner.run(options(out))
    monkeypatch.setattr(runner, "SHORTEST_SECONDS", 5.0)
    runner.run(options(out, only=("machine",)))
    before = json.loads(out.read_text())["sections"]
    assert before["machine"]["status"] == "complete" and before["attention"]["status"] == "did not fit"
    runner.run(options(out, resume=True))
    after = json.loads(out.read_text())["sections"]
    assert after["machine"] == before["machine"]
    assert after["attention"]["status"] == "complete" and len(after["attention"]["rows"]) == 18


def test_files_that_are_not_this_machines_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    out.write_text(json.dumps({"machine": {"device": "NVIDIA H100"}, "tiny": False, "sections": {}}))
    with pytest.raises(UserError, match=r"is of .*H100.*give another --out"):
        runner.run(options(out))
    out.write_text("[]")
    with pytest.raises(UserError, match="is not a result of this command"):
        runner.run(options(out))


def test_the_dry_run_says_what_is_expected(tmp_path: Path) -> None:
    text = runner.run(options(tmp_path / "gpu.json", dry_run=True))
    assert (
        "| distill | 120 | 40 |" in text
        and f"{sum(one.seconds for one in SECTIONS.values()):.0f} s in all" in text
    )
    assert not (tmp_path / "gpu.json").exists()
