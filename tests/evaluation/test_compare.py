"""Results side by side: what compares is a table, what does not is refused with the reason."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from evaluation.compare import main
from evaluation.metrics.estimates import difference, mean_estimate
from evaluation.protocols.image_protocol import metric_hash
from evaluation.reports.html_report import write_html
from evaluation.reports.markdown import metric_rows, result_markdown
from tests.helpers.refusals import refusal


def result(path: Path, fid: float, clip: float | None = None, **changes: Any) -> Path:
    """A result file; `changes` go into the settings of FID."""
    settings = {"protocol": "clean", "samples": 100, "judge": {"weights": "a"}} | changes
    metrics = {
        "fid": {
            "value": fid,
            "samples": settings["samples"],
            "low": fid - 1,
            "high": fid + 1,
            "infinity": fid - 0.5,
            "hash": metric_hash(settings),
            "settings": settings,
        }
    }
    if clip is not None:
        metrics["clip_score"] = {"value": clip, "samples": 100, "hash": "c", "settings": {}}
    content = {
        "model": "m",
        "nfe": 1,
        "guidance_scale": 0.0,
        "protocol": {"name": "clean"},
        "metrics": metrics,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def test_a_table_of_what_compares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [result(tmp_path / "student.json", 20.5, 30.0), result(tmp_path / "teacher.json", 13.25, 31.0)]
    main([*map(str, files), "--out", str(tmp_path / "out.md")])
    said = capsys.readouterr().out
    assert "|  | FID ↓ | CLIP score ↑ |" in said
    assert "| student | 20.5 (19.5 to 21.5) | 30 |" in said
    assert "| teacher | **13.25** (12.25 to 14.25) | **31** |" in said
    assert "(N = 100)" in said
    assert (tmp_path / "out.md").read_text() == said


def test_differences_of_paired_samples_have_intervals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = torch.Generator().manual_seed(1)
    of_prompt = torch.randn(400, generator=generator).double()  # what the images of one prompt share
    files = []
    for name, shift in (("a", 0.0), ("b", 0.2)):
        values = of_prompt + shift + 0.1 * torch.randn(400, generator=generator).double()
        file = result(tmp_path / f"{name}.json", 20.0)
        content = json.loads(file.read_text())
        entry = mean_estimate(values, torch.arange(400)).as_dict() | {"hash": "c", "settings": {}}
        content["metrics"]["clip_score"] = entry
        content["ms_per_image"] = 12.5
        file.write_text(json.dumps(content))
        files.append(str(file))
    main(files)
    said = capsys.readouterr().out
    assert "| ms/image |" in said and "| 12.5 |" in said
    assert "Minus a:" in said
    assert "| b | FID | +0 |  |" in said  # without groups there is no interval
    row = next(line for line in said.splitlines() if line.startswith("| b | CLIP score |"))
    value, low, high = (float(number) for number in re.findall(r"[-+]?\d\.[\d]+", row))
    assert low < 0.2 < high and low < value < high
    assert high - low < 0.05  # each value alone is known to 0.1


def test_intervals_of_differences_cover_the_truth() -> None:
    covered = []
    for trial in range(300):
        generator = torch.Generator().manual_seed(trial)
        shared = torch.randn(203, generator=generator).double()
        found = [
            mean_estimate(
                shared + shift + 0.5 * torch.randn(203, generator=generator).double(), torch.arange(203)
            ).as_dict()
            for shift in (0.0, 0.3)
        ]
        one = difference(found[1]["value"] - found[0]["value"], found[1], found[0])
        assert one is not None and one.low is not None and one.high is not None
        covered.append(one.low <= 0.3 <= one.high)
    assert 0.91 < sum(covered) / len(covered) < 0.985


def test_differences_need_the_same_samples() -> None:
    values = torch.arange(50).double()
    one = mean_estimate(values, torch.arange(50)).as_dict()
    assert difference(0.0, mean_estimate(values[:40], torch.arange(40)).as_dict(), one) is None
    assert difference(0.0, mean_estimate(values).as_dict(), one) is None


def test_different_hashes_are_refused_with_what_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = result(tmp_path / "a.json", 20.0, 30.0)
    b = result(tmp_path / "b.json", 20.0, 30.0, samples=50, judge={"weights": "b"})
    assert refusal(main, [a, b], capsys) == (
        "compare: FID of a and b are not comparable (samples: 100 != 50, judge.weights: a != b); "
        "--metrics clip_score compares."
    )
    main([str(a), str(b), "--metrics", "clip_score"])


def test_stored_images_compare_with_a_model_by_metrics_without_captions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = result(tmp_path / "stored.json", 20.0, captions=None)
    student, other = (result(tmp_path / f"{name}.json", 21.0, captions=name) for name in ("student", "other"))
    main([str(stored), str(student)])
    said = "FID of student and other are not comparable (captions: student != other)"
    assert said in refusal(main, [stored, student, other], capsys)
    fewer = result(tmp_path / "fewer.json", 20.0, captions=None, samples=50)
    assert "(samples: 50 != 100)" in refusal(main, [fewer, student], capsys)


def test_files_that_are_not_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = result(tmp_path / "a.json", 1.0)
    (tmp_path / "b.json").write_text("{}")
    (tmp_path / "c.json").write_text("no json")
    for name, message in (("b", "it has no 'metrics'"), ("c", "cannot be read"), ("d", "cannot be read")):
        said = refusal(main, [good, tmp_path / f"{name}.json"], capsys)
        assert said.startswith("compare: ") and f"{name}.json" in said and message in said
    assert "a has no kid; it has fid" in refusal(main, [good, "--metrics", "kid"], capsys)
    assert "one result was given twice" in refusal(main, [good, good], capsys)
    other = result(tmp_path / "x" / "a.json", 1.0)
    main([str(good), str(other)])  # distinguished by their folders


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"protocol": "fingerprint"}', "it has no 'metrics'"),
        ('{"metrics": [1]}', "its 'metrics' are a list, not an object"),
        ('{"metrics": {"fid": 3.0}}', "its metric fid lacks 'value', 'samples', 'hash' or 'settings'"),
        ('{"metrics": {"fid": {"value": NaN, "samples": 9, "hash": "a", "settings": {}}}}', "is no finite number"),
        ('{"metrics": {"fid": {"value": "1", "samples": 9, "hash": "a", "settings": {}}}}', "is no finite number"),
        ('{"metrics": {"fid": {"value": 1, "samples": 9, "hash": "a", "settings": {}, "low": "0"}}}', "is no finite number"),
        ('{"metrics": {"fid": {"value": 1, "samples": 9, "hash": "a", "settings": null}}}', "of its metric fid are no object"),
        ("[" * 100_000, "cannot be read as a result"),
    ],
)  # fmt: skip
def test_results_that_were_edited(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, message: str
) -> None:
    good, edited = result(tmp_path / "a.json", 1.0), tmp_path / "edited.json"
    edited.write_text(content)
    said = refusal(main, [good, edited], capsys)
    assert "edited.json" in said and message in said


def test_results_without_intervals_still_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = {"model": "m", "fid": 1.5, "clip_score": 90.0, "protocol": {"fingerprint": "f", "samples": 7}}
    for name, changes in (
        ("a", {}),
        ("b", {"fid": 1.25}),
        ("c", {"protocol": {"fingerprint": "g", "samples": 8}}),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(old | changes))
    main([str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    assert "| b | **1.25** |" in capsys.readouterr().out
    assert "samples: 7 != 8" in refusal(main, [tmp_path / "a.json", tmp_path / "c.json"], capsys)


def test_markdown_and_html_hold_every_number(tmp_path: Path) -> None:
    content = json.loads(result(tmp_path / "a.json", 20.5, 30.0).read_text())
    rows = metric_rows(content)
    assert rows[0][1:5] == ["20.5", "19.5 to 21.5", "20", "100"]
    page = result_markdown(content)
    images = {0: Image.new("RGB", (600, 300), "red"), 3: Image.new("RGB", (20, 20))}
    write_html(tmp_path / "r" / "a.html", content, images, ["a <b>", "", "", "d"], {0: images[3]})
    text = (tmp_path / "r" / "a.html").read_text()
    for row in rows:
        for cell in row:
            assert cell in page
            assert cell in text
    assert text.count("data:image/png;base64,") == 3
    assert "a &lt;b&gt;" in text
    assert "http" not in text  # needs nothing else
    assert text.count("<figcaption>d<") == 1
