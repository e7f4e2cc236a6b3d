"""What is computed from score files: spreads over seeds, summaries, paired differences."""

from __future__ import annotations

import copy
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from evaluation.benchmarks.tables.__main__ import main
from evaluation.benchmarks.tables.score_files import (
    COMPARED,
    KeptRows,
    mean_differences,
    named_folders,
    seed_differences,
    summarise_scores,
    write_scores,
)
from evaluation.benchmarks.tables.scores import over_seeds
from evaluation.reports.cost_curves import cost_curves, lines_of
from evaluation.reports.markdown import score_file_markdown
from evaluation.reports.result_file import read_result, write_result
from tests.helpers.refusals import refusal
from tests.helpers.tiny_run import ROOT

RESULTS = ROOT / "evaluation" / "results"


def test_a_row_is_the_spread_over_its_seeds() -> None:
    def scores(fid: float, cost: float | None = 3.0) -> dict[str, Any]:
        rest = {"clip_score": 1.0, "caption_accuracy": 0.5, "attribute_accuracy": 0.6, "diversity": 0.1}
        return {"fid": fid, **rest, "cpu_seconds": cost, "parameters": 7}

    row = over_seeds({0: scores(1.0), 5: scores(4.0)})
    assert row["fid"] == {"mean": 2.5, "smallest": 1.0, "largest": 4.0, "values": [1.0, 4.0]}
    assert row["seeds"] == [0, 5] and row["parameters"] == 7
    assert over_seeds({0: scores(1.0, None)})["cpu_seconds"] is None  # unknown is not 0
    partly = over_seeds({0: scores(1.0, None), 1: scores(1.0)})["cpu_seconds"]
    assert (partly["mean"], partly["values"]) == (3.0, [None, 3.0])


def recipe_row(cost: float | None, accuracy: float) -> dict[str, Any]:
    scores = {"caption_accuracy": accuracy, "shape_score": accuracy / 2, "cpu_seconds": cost}
    return over_seeds({0: {**scores, "parameters": 7}})


def test_costs_are_relative_to_the_first_row_that_has_one() -> None:
    rows = {"old": recipe_row(None, 0.5), "plain": recipe_row(200.0, 0.6), "fast": recipe_row(50.0, 0.7)}
    lines = score_file_markdown({"rows": rows}).splitlines()
    assert lines[0].split(" | ")[-1] == "processor time, first row = 1 |"
    assert [line.split(" | ")[-1] for line in lines[2:5]] == [" |", "1.00 |", "0.25 |"]
    assert "processor time" not in score_file_markdown({"rows": {"plain": rows["plain"]}})


def test_rows_that_differ_by_their_budget_form_a_line_of_rising_cost(tmp_path: Path) -> None:
    rows = {
        "plain_2x": recipe_row(200.0, 0.7),
        "plain": recipe_row(100.0, 0.6),
        "other_halfx": recipe_row(60.0, 0.5),
        "unknown": recipe_row(None, 0.5),
    }
    points = {
        name: [(cost, row["caption_accuracy"]["mean"]) for cost, row in line]
        for name, line in lines_of(rows).items()
    }
    assert points == {"plain": [(100.0, 0.6), (200.0, 0.7)], "other": [(60.0, 0.5)]}
    cost_curves(rows, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as drawn:
        drawn_colours = drawn.convert("RGB").getcolors(1 << 24)
        assert drawn.width > 1000 and drawn_colours is not None
    assert {(31, 119, 180), (255, 127, 14)} <= {colour for _, colour in drawn_colours}  # two lines
    del rows["plain"]["shape_score"]  # of a run that was scored before there was one
    cost_curves(rows, tmp_path / "curves.png")
    with pytest.raises(ValueError, match="no row has its processor time"):
        cost_curves({"unknown": rows["unknown"]}, tmp_path / "none.png")


REPORT: dict[str, Any] = json.loads((RESULTS / "quickstart_seed0.json").read_text())


def reports() -> dict[str, dict[str, Any]]:
    """The committed one, and one with a FID higher by 1 and another seed."""
    other = copy.deepcopy(REPORT)
    other["seed"] = 1
    other["student"]["fid"] += 1
    return {"a.json": REPORT, "b.json": other}


def test_summary_of_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = []
    for name, report in reports().items():
        (tmp_path / name).write_text(json.dumps(report))
        files.append(str(tmp_path / name))
    main(["seeds", *files, "--out", str(tmp_path / "out" / "seeds.json")])
    summary, fid = json.loads((tmp_path / "out" / "seeds.json").read_text()), REPORT["student"]["fid"]
    assert summary["student"]["fid"] == pytest.approx(
        {"mean": fid + 0.5, "smallest": fid, "largest": fid + 1}
    )
    assert summary["student_before"]["fid"]["mean"] == REPORT["student_before"]["fid"]
    assert summary["seeds"] == [0, 1]
    (row,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("| student | "))
    assert f" | {fid + 0.5:.2f} ({fid:.2f} to {fid + 1:.2f}) | " in row
    (tmp_path / "a.json").write_text("{}")
    assert "seeds: a report has no field 'protocol'" in refusal(main, ["seeds", *files], capsys)


def test_the_committed_summaries_follow_from_the_committed_scores() -> None:
    files = {
        f"quickstart_seed{seed}.json": json.loads((RESULTS / f"quickstart_seed{seed}.json").read_text())
        for seed in range(3)
    }
    assert summarise_scores(files) == json.loads((RESULTS / "quickstart_seeds.json").read_text())
    rows = json.loads((RESULTS / "toy_recipes.json").read_text())["rows"]
    stored = json.loads((RESULTS / "toy_recipes_paired.json").read_text())["differences"]
    for pair, scores in stored.items():
        found = mean_differences(rows, *pair.split(":"))
        for score, numbers in scores.items():
            assert found[score] == pytest.approx(numbers, rel=1e-9), (pair, score)


@pytest.mark.parametrize("key", ["base_sha256", "student_updates"])
def test_reports_of_another_setting_are_refused(key: str) -> None:
    both = reports()
    both["b.json"][key] = "other"
    with pytest.raises(ValueError, match=f"b.json has {key} other and a.json has .* not comparable"):
        summarise_scores(both)
    with pytest.raises(ValueError, match=r"seeds \[0, 0\]; give one report for each seed"):
        summarise_scores({"a.json": REPORT, "b.json": REPORT})


def row(seeds: list[int], values: list[float | None]) -> dict[str, Any]:
    return {"seeds": seeds, **{score: {"values": values} for score in COMPARED}}


ROWS = {
    "a": row([0, 1, 2], [3.0, 5.0, 9.0]),
    "b": row([2, 0, 7], [4.0, 1.0, 0.0]),
    "b2": row([2, 0], [4.00001, 1.00001]),
    "c": row([0, 1], [None, 1.0]),
}


def test_paired_differences_match_seeds_and_leave_out_what_a_row_lacks() -> None:
    assert sorted(seed_differences(ROWS, "a", "b", "fid")) == [2.0, 5.0]
    assert seed_differences(ROWS, "a", "c", "fid") == [4.0]
    found = mean_differences(ROWS, "a", "b")["caption_accuracy"]
    assert found == {"mean": 3.5, "standard_error": pytest.approx((2 * 1.5**2 / 2) ** 0.5), "differences": 2}


def test_a_score_that_a_row_lacks_is_left_out_and_fewer_seeds_of_one_are_shown() -> None:
    rows: dict[str, dict[str, Any]] = {
        "a": {
            "seeds": [0, 1, 2],
            "fid": {"values": [1.0, 2.0, 3.0]},
            "diversity": {"values": [1.0, None, 3.0]},
        },
        "b": {
            "seeds": [0, 1, 2],
            "fid": {"values": [1.0, 1.0, 1.0]},
            "diversity": {"values": [1.0, 1.0, 1.0]},
        },
    }
    rows["a"] |= {"shape_score": {"values": [1.0, 2.0, 3.0]}}
    rows["b"] = {**rows["b"], "shape_score": None}  # as `recipes` writes what none of the row's runs has
    found = mean_differences(rows, "a", "b")
    assert {score: numbers["differences"] for score, numbers in found.items()} == {"fid": 3, "diversity": 2}
    shown = score_file_markdown({"differences": {"a:b": found}})
    assert shown.endswith("| a - b | +1.00 ± 0.58 | +1.000 ± 1.000 | 2 to 3 |\n")


def test_paired_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "table.json"
    table.write_text(json.dumps({"rows": ROWS}))
    main(["paired", str(table), "--pairs", "a:b", "--out", str(tmp_path / "paired.json")])
    written = json.loads((tmp_path / "paired.json").read_text())
    assert list(written["differences"]) == ["a:b"] and written["differences"]["a:b"]["fid"]["mean"] == 3.5
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("|  | shape score | clean images, % | FID |") and shown[0].endswith(
        "| seeds |"
    )
    assert shown[2].startswith("| a - b | +3.500 ± 1.500 | +350.0 ± 150.0 | +3.50 ± 1.50 |") and shown[
        2
    ].endswith("| 2 |")
    main(["paired", str(table), "--pairs", "b:b2", "b:a"])
    same, behind = (line for line in capsys.readouterr().out.splitlines() if line.startswith("| b"))
    assert same.startswith("| b - b2 | 0.000 ± 0.000 |") and behind.startswith("| b - a | -3.500 ± 1.500 |")
    for pair, message in (
        ("a:nobody", "there are no values of 'nobody' by seed; there are a, b, b2, c"),
        ("a:c", "a:c, shape_score: a standard error needs two or more common seeds, got 1"),
        ("a", "--pairs takes ROW:ROW, got 'a'"),
    ):
        assert f"tables paired: {message}" in refusal(main, ["paired", str(table), "--pairs", pair], capsys)


def test_known_rows_outlive_an_interruption(tmp_path: Path) -> None:
    path, settings = tmp_path / "scores" / "table.json", {"protocol": {"name": "toy"}, "seed": 0}

    def content(rows: dict[str, Any]) -> dict[str, Any]:
        return {**settings, "rows": rows}

    first = KeptRows(path, settings, content)
    assert first.known == {}
    for name in ("one", "two", "three"):
        first.add(name, {"fid": len(name)})
    assert "| three | 5.00 |" in first.finish()

    again = KeptRows(path, settings, content)
    assert list(again.known) == ["one", "two", "three"]
    again.add("one", {"fid": 9})  # and here it is stopped
    assert read_result(path)["rows"] == {"one": {"fid": 9}, "two": {"fid": 3}, "three": {"fid": 5}}
    again.finish()
    assert read_result(path) == {**settings, "rows": {"one": {"fid": 9}}}
    assert KeptRows(path, {**settings, "seed": 1}, content).known == {}


def test_a_file_that_is_not_of_the_command_stays(tmp_path: Path) -> None:
    path, settings = tmp_path / "table.json", {"protocol": {"name": "toy"}}
    for stored, why in (
        ({"rows": {"one": {"fid": 1}}}, "it has no protocol"),
        ({**settings, "runs": {}}, "it has no rows"),
        ({**settings, "rows": []}, "its rows are none"),
        ({**settings, "rows": {"one": 1}}, "its rows are none"),
    ):
        path.write_text(json.dumps(stored))
        with pytest.raises(ValueError, match=re.escape(f"is not of this command ({why}); give another file")):
            KeptRows(path, settings, lambda rows: {**settings, "rows": rows})
        assert json.loads(path.read_text()) == stored
    for folder in (tmp_path, path / "below.json"):
        with pytest.raises(OSError, match="folder|exists"):  # before anything is measured
            KeptRows(folder, settings, lambda rows: {**settings, "rows": rows})


def test_a_name_of_two_rows_is_refused() -> None:
    assert named_folders("--unet", "kd=a", ["kd=a", "task=b=c"]) == {"kd": "a", "task": "b=c"}
    for given in (["kd=a", "kd=b"], ["base=a"]):
        with pytest.raises(
            ValueError, match=f"--unet '{given[-1]}': there is another row '{given[-1][:-2]}'"
        ):
            named_folders("--unet", "kd=a", given, ["base"])
    for wrong in ("kd", "=a", "kd="):
        with pytest.raises(ValueError, match=f"--unet takes NAME=FOLDER, such as kd=a, got '{wrong}'"):
            named_folders("--unet", "kd=a", [wrong])


@pytest.mark.parametrize(
    ("command", "content"),
    [
        ("show", "[" * 100_000),
        ("show", {}),
        ("show", {"rows": []}),
        ("show", {"rows": {"a": {"fid": "low"}}}),
        ("show", {"rows": {}, "ordered_by": "fid"}),
        ("show", {"rows": {"a": {"cpu_seconds": {"mean": 0}}, "b": {"cpu_seconds": {"mean": 1}}}}),
        ("paired", {"rows": {"a": "x", "b": "y"}}),
        ("paired", {"rows": {name: {"fid": {"values": [1, 2]}} for name in "ab"}}),
        ("paired", {"rows": {name: row([0, 1], ["x", 1.0]) for name in "ab"}}),  # type: ignore[list-item]
        ("paired", {"rows": {name: row([0, 1], [1.0]) for name in "ab"}}),
        ("seeds", REPORT | {"protocol": None}),
        ("seeds", REPORT | {"student": REPORT["student"] | {"fid": "low"}}),
    ],
)
def test_a_damaged_file_has_a_sentence(
    command: str, content: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "table.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    more = ["--pairs", "a:b"] if command == "paired" else []
    assert refusal(main, [command, file, *more], capsys).startswith(f"tables {command}: ")


def test_what_is_read_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, report = tmp_path / "table.json", tmp_path / "report.json"
    table.write_text(json.dumps({"rows": ROWS}))
    report.write_text(json.dumps(REPORT))
    for given in (["paired", table, "--pairs", "a:b", "--out", table], ["seeds", report, "--out", report]):
        assert "is a file that is read, which the result would replace" in refusal(main, given, capsys)
    assert "is given twice; give one for each seed" in refusal(main, ["seeds", report, report], capsys)
    assert "the difference of a row from itself" in refusal(main, ["paired", table, "--pairs", "a:a"], capsys)
    table.write_text(json.dumps({"rows": {"a": {}, "b": {}}}))
    said = refusal(main, ["paired", table, "--pairs", "a:b"], capsys)
    assert "the rows a and b have none of shape_score" in said


def test_a_score_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "table.json"
    write_scores(path, {"rows": {"one": {"fid": 1}}})

    def full(self: Path, text: str) -> int:
        with self.open("w") as file:
            file.write(text[:10])
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="no space left"):
        write_scores(path, {"rows": {"one": {"fid": 2}}})
    assert read_result(path)["rows"] == {"one": {"fid": 1}}
    assert list(tmp_path.iterdir()) == [path]


def test_links_pipes_and_devices_stay_what_they_are(tmp_path: Path) -> None:
    file, link, pipe = tmp_path / "file.json", tmp_path / "link.json", tmp_path / "pipe"
    link.symlink_to(file)
    write_result(link, {"fid": 1})
    assert link.is_symlink() and read_result(file) == {"fid": 1}
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_result(pipe, {"fid": 2})
    assert json.loads(os.read(reader, 1000)) == {"fid": 2} and pipe.is_fifo()
    os.close(reader)
