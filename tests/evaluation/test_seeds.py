"""The table over seeds."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from evaluation.reports.seeds import main, summarise

REPORT: dict[str, Any] = json.loads(
    (Path(__file__).parents[2] / "evaluation" / "results" / "quickstart_seed0.json").read_text()
)


def reports() -> dict[str, dict[str, Any]]:
    """The committed one, and one with a FID higher by 1 and another seed."""
    other = copy.deepcopy(REPORT)
    other["seed"] = 1
    other["student"]["fid"] += 1
    return {"a.json": REPORT, "b.json": other}


def test_mean_and_range() -> None:
    summary = summarise(reports())
    fid = REPORT["student"]["fid"]
    assert summary["student"]["fid"] == pytest.approx(
        {"mean": fid + 0.5, "smallest": fid, "largest": fid + 1}
    )
    assert summary["student_before"]["fid"]["mean"] == REPORT["student_before"]["fid"]
    assert summary["seeds"] == [0, 1]


@pytest.mark.parametrize("key", ["base_sha256", "student_updates"])
def test_runs_of_another_setting_are_refused(key: str) -> None:
    both = reports()
    both["b.json"][key] = "other"
    with pytest.raises(ValueError, match=f"b.json has {key} other and a.json has .* do not compare"):
        summarise(both)


def test_the_same_seed_twice_is_refused() -> None:
    with pytest.raises(ValueError, match=r"seeds \[0, 0\]; give one report for each seed"):
        summarise({"a.json": REPORT, "b.json": REPORT})


def test_the_command_writes_and_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = []
    for name, report in reports().items():
        (tmp_path / name).write_text(json.dumps(report))
        files.append(str(tmp_path / name))
    main([*files, "--out", str(tmp_path / "out" / "seeds.json")])
    assert json.loads((tmp_path / "out" / "seeds.json").read_text())["seeds"] == [0, 1]
    assert "seeds [0, 1]" in capsys.readouterr().out
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(SystemExit, match="no field 'protocol' in a report"):
        main(files)
