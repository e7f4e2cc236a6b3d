"""The table of scores with intervals, and the count of passes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evaluation.benchmarks.gpu.random_base import config_folder
from evaluation.benchmarks.passes import Counting, Setting, stage_of
from evaluation.benchmarks.passes import main as passes_main
from evaluation.benchmarks.tables import __main__ as tables
from evaluation.reports.markdown import score_file_markdown
from tests.helpers.refusals import refusal


def test_rows_are_measured_once_and_printed_with_intervals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "quality.json"
    command = ["quality", "--samples", "16", "--steps", "1", "--out", str(out)]
    tables.main(command)
    printed = capsys.readouterr().out
    content = json.loads(out.read_text())
    assert list(content["rows"]) == ["real images", "autoencoder", "base, 1 step"]
    real, one = (content["rows"][row]["estimates"]["shape_score"] for row in ("real images", "base, 1 step"))
    assert one["high"] < real["low"]  # 16 images are enough for this
    assert score_file_markdown(content).strip() in printed
    assert "intervals overlap: real images / autoencoder" in printed
    before = content["rows"]["base, 1 step"]
    content["rows"]["base, 1 step"]["estimates"]["shape_score"]["value"] = 0.5
    out.write_text(json.dumps(content))
    tables.main(command)
    assert json.loads(out.read_text())["rows"]["base, 1 step"] == before  # kept, not measured again


def test_a_place_that_cannot_be_written_is_refused_before_passes_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evaluation.benchmarks.passes.count_all", lambda base: pytest.fail("counted"))
    assert (
        refusal(passes_main, ["--out", tmp_path], capsys) == f"passes: '{tmp_path}' is a folder; give a file."
    )


def test_passes_are_those_that_one_counts_by_hand(tmp_path: Path) -> None:
    """A forward pass is 1, a backward pass 2, less what needs no gradient: noise and prompts, which weigh much here."""
    base = config_folder("sd15", tmp_path, tiny=True)
    unit = Counting(stage_of(base, None, Setting(1))).base_forward()

    def passes(setting: Setting) -> float:
        return Counting(stage_of(base, None, setting)).passes(unit)["passes"]

    # Student 1 + 2, fake score 1, guided real score 2; then the fake score's own 1 + 2.
    assert passes(Setting(1)) == pytest.approx(9.0, rel=0.15)
    four = passes(Setting(4))
    assert four == pytest.approx(9.0 + 3 * 4, rel=0.15)  # each further iteration: student 1, fake score 3
    assert four - passes(Setting(4, per_sample=4)) == pytest.approx(3.0, rel=1e-3)
    assert four + 2 < passes(Setting(4, gan="fake_score")) < four + 12
