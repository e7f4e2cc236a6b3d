"""Rows against each other, seed by seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evaluation.benchmarks.paired import SCORES, compare, differences, main


def row(seeds: list[int], values: list[float | None]) -> dict[str, Any]:
    return {"seeds": seeds, **{score: {"values": values} for score in SCORES}}


ROWS = {
    "a": row([0, 1, 2], [3.0, 5.0, 9.0]),
    "b": row([2, 0, 7], [4.0, 1.0, 0.0]),
    "c": row([0, 1], [None, 1.0]),
}


def test_seeds_are_matched_by_their_number_and_what_one_row_lacks_is_left_out() -> None:
    assert sorted(differences(ROWS, [("a", "b")], "fid")) == [2.0, 5.0]
    assert sorted(differences(ROWS, [("a", "b"), ("a", "c")], "fid")) == [2.0, 4.0, 5.0]
    assert differences(ROWS, [("a", "c")], "fid") == [4.0]


def test_mean_and_standard_error() -> None:
    found = compare(ROWS, [("a", "b"), ("a", "c")])["caption_accuracy"]
    assert found["mean"] == pytest.approx(11 / 3) and found["differences"] == 3
    assert found["standard_error"] == pytest.approx(((25 + 1 + 16) / 9 / 2 / 3) ** 0.5)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "table.json").write_text(json.dumps({"rows": ROWS}))
    arguments = [str(tmp_path / "table.json"), "--pairs", "a:b", "--out", str(tmp_path / "paired.json")]
    main(arguments)
    written = json.loads((tmp_path / "paired.json").read_text())
    assert written["pairs"] == ["a:b"] and written["fid"]["mean"] == 3.5
    assert "+3.5000" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (["a:nobody"], "paired: there are no values of 'nobody' by seed; there are a, b, c"),
        (["a:c"], "paired: fid: a standard error needs two differences or more, got 1"),
    ],
)
def test_refusals(tmp_path: Path, pairs: list[str], message: str) -> None:
    (tmp_path / "table.json").write_text(json.dumps({"rows": ROWS}))
    with pytest.raises(SystemExit, match=message):
        main([str(tmp_path / "table.json"), "--pairs", *pairs])
