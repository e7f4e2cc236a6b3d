"""kill -9, small: `python -m evaluation.benchmarks.throughput resume --kills 50` is the same with more trials."""

import json
from pathlib import Path
from typing import Any

import pytest

from data.shards.datamodule import ShardDataModule
from evaluation.benchmarks import throughput, throughput_resume
from evaluation.benchmarks.throughput import ResumeOptions


@pytest.mark.timeout(200)
def test_a_killed_run_goes_on_as_if_nothing_had_happened() -> None:
    result = throughput_resume.run(ResumeOptions(kills=2, workers=(0, 2), seed=1))
    assert result["equal"] == 2 and result["failed"] == ""
    assert {"sample_ids", "crops", "pixels", "captions", "noise", "timesteps"} <= set(result["compared"])
    for trial in result["trials"]:
        assert trial["resumed_from_step"] <= trial["killed_after_step"] < result["steps_of_a_run"]
        assert trial["steps_compared"] == result["steps_of_a_run"] - trial["resumed_from_step"] > 0


def test_what_is_compared_would_tell(tmp_path: Path) -> None:
    """Another seed, crop or caption gives other lines."""
    throughput_resume.write_samples(tmp_path / "shards")
    options: dict[str, Any] = {"contents": ["images", "latents"], "resolution": 32}
    lines = []
    for change in ({}, {"crop": "random"}, {"flip": True}, {"caption_fields": ["others"]}, {"seed": 1}):
        data = ShardDataModule(str(tmp_path / "shards"), 8, **options | change)
        data.setup()
        assert data.dataset is not None
        lines.append(throughput_resume.describe(data.dataset.batch(range(8))))
    base = lines[0]
    differ = [{name for name in base if line[name] != base[name]} for line in lines[1:]]
    assert differ[0] == {"crops", "pixels"} and "pixels" in differ[1] and differ[2] == {"captions"}
    assert "sample_ids" in differ[3]


def test_the_command_writes_its_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(throughput_resume, "run", lambda options: {"kills": options.kills, "failed": ""})
    throughput.main(["resume", "--kills", "7", "--out", str(tmp_path / "a" / "r.json")])
    assert json.loads((tmp_path / "a" / "r.json").read_text())["kills"] == 7
    monkeypatch.setattr(throughput_resume, "run", lambda options: {"failed": "1 of 7 resumed runs differ."})
    for arguments, code, message in (
        (["resume"], 1, "throughput resume: 1 of 7 resumed runs differ"),
        (["nothing"], 2, "throughput: 'nothing' is not a command"),
    ):
        with pytest.raises(SystemExit) as stopped:
            throughput.main(arguments)
        assert stopped.value.code == code and message in capsys.readouterr().err
