"""python -m evaluation.latency on a tiny model of random weights, and its arithmetic."""

from __future__ import annotations

import json
import multiprocessing
import threading
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from evaluation.benchmarks.latency import command
from evaluation.benchmarks.latency.command import with_ratios
from evaluation.benchmarks.latency.random_models import random_model, unet_config
from evaluation.benchmarks.latency.report import table
from evaluation.benchmarks.latency.subjects import serve
from evaluation.latency import LatencyOptions, main
from sdxs_lightning.inference.generator import OneStepGenerator


def row(subject: str, seconds: float, **components: float) -> dict[str, Any]:
    return {
        "subject": subject,
        "batch_size": 1,
        "seconds": seconds,
        "low": seconds,
        "high": seconds,
        "components": components,
        "images_per_second": 1 / seconds,
        "peak_megabytes": 1.0,
    }


def test_ratios() -> None:
    rows = [
        row("student, diffusers", 4.0, unet=1.0),
        row("student, torch", 0.5, unet=0.25),
        row("base, 16 steps", 50.0),
    ]
    found = with_ratios(rows, ratios_only=True)
    assert [one["times_faster_than_first"] for one in found] == [1.0, 8.0, 0.08]
    assert [one["times_faster_than_base"] for one in found] == [12.5, 100.0, 1.0]
    assert found[1]["seconds"] == 0.125 and found[1]["components"] == {"unet": 0.0625}
    assert "images_per_second" not in found[0]
    assert with_ratios(rows, ratios_only=False)[1]["seconds"] == 0.5
    line = table({"rows": found}).splitlines()[3]
    assert line == "| student, torch | 1 | 0.1250 (0.1250 to 0.1250) | 0.0625 | 1 | 8.00 | 100.0 |"


class _Threads:
    """Stands in for multiprocessing's context: processes would each spend ten seconds on importing torch and diffusers."""

    Pipe = staticmethod(multiprocessing.Pipe)

    class Process(threading.Thread):
        def terminate(self) -> None:
            self.join(60)


def test_measures_a_student_against_its_base(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multiprocessing, "get_context", lambda kind: _Threads)
    monkeypatch.setattr(command, "serve_quietly", serve)
    line = "--random_weights tiny --baseline tiny --steps 3 --guidance_scale 2 --composed_baseline --backend torch onnx"
    more = (
        f"--batch_sizes 1 2 --repetitions 1 --threads 1 --clock cpu --device cpu --work {tmp_path / 'work'}"
    )
    main([*line.split(), *more.split(), "--out", str(tmp_path / "speed.json")])
    result = json.loads((tmp_path / "speed.json").read_text())
    names = [one["subject"] for one in result["rows"] if one["batch_size"] == 1]
    assert names == [
        "student, diffusers, KL decoder",
        "student, diffusers",
        "student, torch",
        "student, onnx fp32",
        "base, 3 steps, guidance 2",
    ]
    rows = {(one["subject"], one["batch_size"]): one for one in result["rows"]}
    assert len(rows) == 10
    for one in result["rows"]:
        assert {"text", "unet", "decoder"} <= one["components"].keys()
        assert 0 < sum(one["components"].values()) <= one["seconds"] * 1.001
        assert one["images_per_second"] == pytest.approx(one["batch_size"] / one["seconds"])
    assert rows["base, 3 steps, guidance 2", 1]["composed"]
    assert result["threads"] == 1 and result["clock"] == "cpu" and "torch" in result["versions"]
    assert capsys.readouterr().out.strip() == (tmp_path / "speed.md").read_text().strip()
    assert Image.open(tmp_path / "speed.png").width > 500
    assert OneStepGenerator.load(random_model("tiny", tmp_path / "work"), device="cpu").generate(
        "a"
    ).shape == (1, 3, 64, 64)


def test_architectures_are_the_published_ones() -> None:
    student, large = unet_config("sdxs-512"), unet_config("sdxs-1024")
    assert student["mid_block_type"] is None and student["block_out_channels"] == [320, 640, 1280]
    assert large["mid_block_type"] == "UNetMidBlock2D" and large["cross_attention_dim"] == 2048


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--model a --preset paper-512", "give one of --model, --random_weights and --preset, got 2"),
        ("--random_weights sdxs", "--random_weights is 'sdxs', but must be one of sdxs-512"),
        ("--model a --backend tensorrt", "--backend is 'tensorrt', but must be one of torch"),
        ("--preset paper-512 --clock cpu --device cuda", "counts processor time"),
    ],
)
def test_messages(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(line.split())
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_presets_resolve() -> None:
    from evaluation.benchmarks.latency.command import _resolved

    found = _resolved(LatencyOptions(preset="paper-1024"))
    assert (found.random_weights, found.baseline, found.steps, found.guidance_scale) == (
        "sdxs-1024",
        "sdxl",
        32,
        7.5,
    )
