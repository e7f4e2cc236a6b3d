"""The profile of an iteration, at tiny size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evaluation.benchmarks.step_profile import StepProfileOptions, run


def test_the_parts_are_the_whole_and_both_arrangements_run(tmp_path: Path) -> None:
    out = tmp_path / "profile.json"
    table = run(StepProfileOptions(tiny=True, repeats=1, batch_size=2, out=out))
    rows = json.loads(out.read_text())["rows"]
    assert list(rows) == ["with GAN", "without GAN"] and all(name in table for name in rows)
    for row in rows.values():
        assert sum(row["shares"].values()) == pytest.approx(1.0) and row["speed"] > 0
        assert all(row["shares"][part] > 0 for part in ("student, forward", "backward", "average"))
