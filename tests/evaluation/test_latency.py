"""python -m evaluation.latency on a tiny model of random weights, and its arithmetic."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from evaluation.benchmarks import runtime_exports
from evaluation.benchmarks.latency import command, subjects
from evaluation.benchmarks.latency.command import with_ratios
from evaluation.benchmarks.latency.random_models import random_model, unet_config
from evaluation.benchmarks.latency.report import table
from evaluation.benchmarks.latency.stopwatch import Stopwatch
from evaluation.benchmarks.latency.subjects import Subject, serve
from evaluation.latency import LatencyOptions, main
from sdxs_lightning.command_line import parse_options
from sdxs_lightning.core.errors import UserError
from sdxs_lightning.core.model_hash import hash_model
from sdxs_lightning.families.weights import load_network
from sdxs_lightning.inference.generator import OneStepGenerator
from sdxs_lightning.networks.controlnet import StudentControlNet, controlnet_from_unet, save_controlnet


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
        (
            "--preset paper-512 --steps 8",
            "--preset names the base and its steps; leave out --baseline and --steps",
        ),
        (
            "--preset paper-512 --baseline b",
            "--preset names the base and its steps; leave out --baseline and --steps",
        ),
        ("--model a --steps 8", "are of the base; give --baseline or --preset"),
        ("--model a --baseline b --controlnet c", "any; --baseline_controlnet is missing"),
        ("--preset paper-512 --baseline_controlnet c", "any; --controlnet is missing"),
    ],
)
def test_messages(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(line.split())
    assert stop.value.code == 2 and message in capsys.readouterr().err


class _Event:
    """Stands in for torch.cuda.Event; each record takes a second."""

    def __init__(self, log: list[str], enable_timing: bool) -> None:
        assert enable_timing
        self._log = log

    def record(self) -> None:
        self._log.append("event")
        self.second = self._log.count("event")

    def elapsed_time(self, end: _Event) -> float:
        return 1000.0 * (end.second - self.second)


def test_on_a_gpu_nothing_waits_inside_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: _Event(log, enable_timing))
    watch = Stopwatch("cuda", "wall")
    unet = watch.watch(lambda: log.append("unet"), "unet")

    def call() -> None:
        unet()
        with watch.part("copy"):
            log.append("copy")
        unet()

    found = watch.timed(call)
    plain = ["unet", "copy", "unet"]
    events = ["event", "unet", "event", "event", "copy", "event", "event", "unet", "event"]
    assert log == ["wait", *plain, "wait", *events, "wait"]
    assert found.pop("end_to_end") < 1 and found == {"unet": 2.0, "copy": 1.0}


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random student of four steps, with its ControlNet in NAME-controlnet."""
    folder = random_model("tiny", tmp_path_factory.mktemp("students"))
    index, file = folder / "model_index.json", folder / "scheduler" / "scheduler_config.json"
    index.write_text(index.read_text().replace("DDIMScheduler", "LCMScheduler"))
    kept = {name: json.loads(file.read_text())[name] for name in ("beta_start", "beta_end", "beta_schedule")}
    several = {"_class_name": "LCMScheduler", "original_inference_steps": 4, **kept}
    file.write_text(json.dumps(several | {"steps_offset": 1, "clip_sample": False}))
    save_controlnet(
        controlnet_from_unet(load_network(UNet2DConditionModel, folder / "unet")), f"{folder}-controlnet"
    )
    return folder


def test_student_and_stock_take_the_same_steps_with_the_same_controlnet(
    student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for kind in (UNet2DConditionModel, StudentControlNet):
        forward = kind.forward

        def counted(self: Any, *given: Any, _forward: Any = forward, **named: Any) -> Any:
            calls.append(type(self).__name__)
            return _forward(self, *given, **named)

        monkeypatch.setattr(kind, "forward", counted)
    controlnet = f"{student}-controlnet"
    line = f"--model {student} --controlnet {controlnet} --device cpu --size_px 32"
    options = parse_options(LatencyOptions, line.split(), "latency")
    for subject in command._subjects(options, student.parent):
        calls.clear()
        assert subject.controlnet == controlnet
        found = subjects._prepared(subject)(2)
        assert calls == ["StudentControlNet", "UNet2DConditionModel"] * 4, subject.name
        assert {"text", "controlnet", "unet", "decoder", "end_to_end"} <= found.keys()


def test_a_composed_base_multiplies_what_every_step_repeats(
    student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = {"text": 1.0, "unet": 2.0, "controlnet": 0.5, "decoder": 3.0, "end_to_end": 7.0}
    monkeypatch.setattr(Stopwatch, "timed", lambda self, call: dict(seconds))
    subject = Subject(
        "base", "base", str(student), controlnet=f"{student}-controlnet", steps=100, composed=True
    )
    found = subjects._prepared(subject)(1)
    assert found == seconds | {"unet": 200.0, "controlnet": 50.0, "end_to_end": 7.0 + 99 * 2.5}


def test_a_kept_export_is_that_of_the_same_networks(student: Path, tmp_path: Path) -> None:
    other = tmp_path / student.name
    shutil.copytree(student, other)
    controlnet = f"{student}-controlnet"
    name = command.export_name(str(student), "onnx", "fp16", None)
    assert command.export_name(str(other), "onnx", "fp16", None) == name
    config = other / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"norm_eps": 1e-4}))
    assert command.export_name(str(other), "onnx", "fp16", None) != name
    controlled = command.export_name(str(student), "onnx", "fp16", controlnet)
    assert controlled.startswith(f"{name}-control-") and controlled.endswith(hash_model(controlnet))


def test_models_that_memory_does_not_hold_at_once_are_refused() -> None:
    gib = 2**30
    with pytest.raises(
        UserError, match=r"3 of 5 models that take turns use 15\.0 GiB, and 4\.0 GiB are left"
    ):
        command.check_memory(3, 5, 19 * gib, 4 * gib)
    command.check_memory(3, 5, 21 * gib, 6 * gib)
    command.check_memory(5, 5, 19 * gib, 0)  # all are there
    command.check_memory(1, 5, None, None)
    assert (command.available_bytes() or gib) > 2**20


def test_the_command_is_kept_without_folders_of_the_machine() -> None:
    line = "--preset paper-512 --work /tmp/w --threads 2 --out=/home/me/a.json"
    assert command.command_line(line.split()) == "python -m evaluation.latency --preset paper-512 --threads 2"


def test_presets_resolve() -> None:
    from evaluation.benchmarks.latency.command import _resolved

    found = _resolved(LatencyOptions(preset="paper-1024"))
    assert (found.random_weights, found.baseline, found.steps, found.guidance_scale) == (
        "sdxs-1024",
        "sdxl",
        32,
        7.5,
    )


def test_a_dead_export_is_named_and_the_ones_before_it_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "exports.json"

    def export(name: str, *_: Any) -> dict[str, Any]:
        if name == "onnx-fp16":
            raise SystemExit(9)  # no answer, as of a process that the system ends
        return {"export": name, "megabytes": {"unet": 1.0}, "peak_over_weights": 2.0}

    class Process(threading.Thread):
        exitcode = -9

        def start(self) -> None:
            with suppress(SystemExit):
                self.run()

        def join(self, timeout: float | None = None) -> None:
            pass

    monkeypatch.setattr(_Threads, "Process", Process)
    monkeypatch.setattr(multiprocessing, "get_context", lambda kind: _Threads)
    monkeypatch.setattr(runtime_exports, "_measured_export", export)
    line = f"--random_weights tiny --work {tmp_path} --out {out} --exports"
    with pytest.raises(SystemExit):
        runtime_exports.main([*line.split(), "onnx-fp32", "onnx-fp16"])
    assert "the export onnx-fp16 of" in (message := capsys.readouterr().err) and "exit code -9" in message
    assert [row["export"] for row in json.loads(out.read_text())["tiny"]] == ["onnx-fp32"]
    runtime_exports.main([*line.split(), "openvino-fp16"])
    assert [row["export"] for row in json.loads(out.read_text())["tiny"]] == ["onnx-fp32", "openvino-fp16"]
