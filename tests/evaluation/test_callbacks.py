"""The callbacks in a real, tiny distillation: what they measure, when, and what they leave in a checkpoint."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from data.shards.datamodule import ShardDataModule
from evaluation.callbacks import progress
from evaluation.callbacks.run_report import Report
from evaluation.callbacks.sample_grids import DistillationMetrics, ProgressBar, SampleGrids, Throughput
from evaluation.images.generate import SampledImages
from evaluation.protocols.protocols import PROTOCOLS
from evaluation.reports.grids import progress_curves
from evaluation.runner.scores import ProtocolNetworks, score_images
from sdxs_lightning.stages.distillation.step import OneStepDistillation
from sdxs_lightning.stages.distillation.update_schedule import UpdateSchedule
from tests.helpers.tiny_distillation import distillation, family_of


def fit(
    world: Path, out: Path, callbacks: list[Callback], updates: int = 5, ckpt_path: Path | None = None
) -> Any:
    """Distil to so many student updates, ratio 1, a student update every batch."""
    update_schedule = UpdateSchedule(max_student_updates=updates, fake_score_updates_per_student_update=1)
    module = distillation(world / "sd-epsilon", update_schedule=update_schedule)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=-1,
        default_root_dir=out,
        logger=[CSVLogger(out, name=None, version=""), TensorBoardLogger(out, name=None, version="")],
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=any(isinstance(one, ProgressBar) for one in callbacks),
        callbacks=callbacks,
    )
    trainer.fit(module, datamodule=ShardDataModule(str(world / "shards"), 4), ckpt_path=ckpt_path)
    return trainer, module


def test_metrics_follow_student_updates_and_survive_a_resume(
    world: Path, toy_networks: dict[str, str], tmp_path: Path
) -> None:
    metrics = DistillationMetrics(every_n_student_updates=2, batch_size=4)
    trainer, module = fit(world, tmp_path, [metrics], updates=3)
    assert [point["student_updates"] for point in metrics.history] == [0, 2, 3]
    assert metrics.history[0]["seconds"] < metrics.history[1]["seconds"] < metrics.history[2]["seconds"]
    assert all(point["training_seconds"] < point["seconds"] for point in metrics.history[1:])
    assert metrics.history[0]["fid"] != metrics.history[1]["fid"]
    assert float(trainer.callback_metrics["val/fid"]) == pytest.approx(metrics.history[-1]["fid"])

    # The same number by hand, on the averaged student rather than on the current one.
    protocol = PROTOCOLS["toy-val"]
    networks, device = ProtocolNetworks.load(protocol), torch.device("cpu")
    by_hand = [
        score_images(
            SampledImages(net, family_of(world / "sd-epsilon"), device), protocol.captions(), networks, device
        ).fid
        for net in (module.ema, module.student)
    ]
    assert metrics.history[-1]["fid"] == pytest.approx(by_hand[0], rel=1e-4)
    assert metrics.history[-1]["fid"] != pytest.approx(by_hand[1], rel=1e-4)

    trainer.save_checkpoint(tmp_path / "state.ckpt")
    again = DistillationMetrics(every_n_student_updates=2, batch_size=4)
    fit(world, tmp_path / "resumed", [again], updates=5, ckpt_path=tmp_path / "state.ckpt")
    assert [point["student_updates"] for point in again.history] == [0, 2, 3, 4, 5]
    assert again.history[:3] == metrics.history
    assert again.history[3]["seconds"] > metrics.history[2]["seconds"]

    with (tmp_path / "metrics.csv").open() as file:
        logged = [row["val/fid"] for row in csv.DictReader(file) if row.get("val/fid")]
    assert [float(value) for value in logged] == pytest.approx([point["fid"] for point in metrics.history])


def test_no_weight_of_a_metric_network_is_in_a_checkpoint(
    world: Path, toy_networks: dict[str, str], tmp_path: Path
) -> None:
    trainer, _ = fit(world, tmp_path / "plain", [], updates=1)
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    callbacks = [DistillationMetrics(1), SampleGrids(1, images=2), Throughput(1)]
    trainer, _ = fit(world, tmp_path / "measured", callbacks, updates=1)
    trainer.save_checkpoint(tmp_path / "measured.ckpt")
    plain, measured = (
        torch.load(tmp_path / f"{name}.ckpt", weights_only=False) for name in ("plain", "measured")
    )
    assert set(measured["state_dict"]) == set(plain["state_dict"])

    def tensors(value: Any) -> int:
        if isinstance(value, dict):
            return sum(tensors(one) for one in value.values())
        if isinstance(value, (list, tuple)):
            return sum(tensors(one) for one in value)
        return int(isinstance(value, torch.Tensor))

    assert tensors(measured["callbacks"]) == 0


def test_measuring_changes_no_weight(world: Path, toy_networks: dict[str, str], tmp_path: Path) -> None:
    _, plain = fit(world, tmp_path / "plain", [], updates=2)
    _, measured = fit(world, tmp_path / "measured", [DistillationMetrics(1, batch_size=3)], updates=2)
    for (name, expected), actual in zip(
        plain.state_dict().items(), measured.state_dict().values(), strict=True
    ):
        assert torch.equal(expected, actual), name


def test_grids_and_throughput(world: Path, toy_networks: dict[str, str], tmp_path: Path) -> None:
    throughput = Throughput(every_n_batches=2)
    fit(world, tmp_path, [SampleGrids(2, images=3), throughput], updates=4)
    names = [path.name for path in sorted((tmp_path / "samples").iterdir())]
    assert names == ["update_00000000.png", "update_00000002.png", "update_00000004.png"]
    first, last = (Image.open(tmp_path / "samples" / name).convert("RGB") for name in (names[0], names[-1]))
    assert first.size == last.size
    assert first.tobytes() != last.tobytes()
    speed = throughput.latest
    images, updates = speed["throughput/images_per_second"], speed["throughput/student_updates_per_second"]
    assert images == pytest.approx(4 * updates)  # ratio 1, batches of 4
    assert 0.05 < speed["throughput/peak_memory_gib"] < 64


def test_progress_bar_prints_lines_without_a_terminal(
    world: Path, toy_networks: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(world, tmp_path, [DistillationMetrics(2), ProgressBar(line_seconds=0.0)], updates=3)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("student updates")]
    assert [line.split()[2] for line in lines] == ["1/3", "2/3", "3/3"]
    assert "fake score" in lines[1]
    assert "FID" in lines[1]
    assert "left" in lines[1]


def test_the_time_left_leaves_out_what_precedes_the_first_update(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pairs take 300 s, each of 11 updates 2 s: after the third 16 s are left, and not 816."""
    now, done = [0.0], [0]
    monkeypatch.setattr("evaluation.callbacks.progress.time.monotonic", lambda: now[0])
    monkeypatch.setattr(progress, "counts_of", lambda trainer: SimpleNamespace(updates=done[0]))
    trainer: Any = SimpleNamespace(max_steps=11, log_every_n_steps=100)
    bar = ProgressBar(line_seconds=0.0)
    bar.on_train_start(trainer, LightningModule())
    now[0] = 300.0
    for done[0] in (1, 2, 3):
        now[0] += 2.0
        bar.on_train_batch_end(trainer, LightningModule(), None, None, 0)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "student updates 1/11 0:05:02",
        "student updates 2/11 0:05:04, 0:00:18 left",
        "student updates 3/11 0:05:06, 0:00:16 left",
    ]


def test_a_terminal_too_shows_the_time_left_of_updates_that_take_a_minute(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, done, screen = [0.0], [0], io.StringIO()
    monkeypatch.setattr(
        progress,
        "Console",
        lambda: Console(file=screen, force_terminal=True, width=120, get_time=lambda: now[0]),
    )
    monkeypatch.setattr("evaluation.callbacks.progress.time.monotonic", lambda: now[0])
    monkeypatch.setattr(progress, "counts_of", lambda trainer: SimpleNamespace(updates=done[0]))
    trainer: Any = SimpleNamespace(max_steps=11, log_every_n_steps=100)
    bar = ProgressBar()
    bar.on_train_start(trainer, LightningModule())
    for done[0] in (1, 2, 3):
        now[0] += 60.0
        bar.on_train_batch_end(trainer, LightningModule(), None, None, 0)
    bar.on_train_end(trainer, LightningModule())
    shown = screen.getvalue()
    assert "3/11" in shown and "0:03:00" in shown and "0:08:00 left" in shown


class WarmedUp(OneStepDistillation):
    """A schedule and names of terms alone: 3 of 11 updates are warm-up, by regression."""

    def __init__(self) -> None:
        LightningModule.__init__(self)
        self.update_schedule = UpdateSchedule(max_student_updates=11, warmup_updates=3)
        self.terms: Any = SimpleNamespace(
            warmup={"regression": None}, distillation={"distribution_matching": None}
        )


def test_after_the_warm_up_the_loss_of_its_last_update_is_shown_no_more(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = {"student/regression": 0.25, "student/distribution_matching": 0.5}
    trainer: Any = SimpleNamespace(max_steps=-1, log_every_n_steps=1, callback_metrics=metrics)
    bar, module, done = ProgressBar(line_seconds=0.0), WarmedUp(), [0]
    monkeypatch.setattr(progress, "counts_of", lambda trainer: SimpleNamespace(updates=done[0]))
    bar.on_train_start(trainer, module)
    for done[0] in (3, 4):
        bar.on_train_batch_end(trainer, module, None, None, 0)
    before, after = capsys.readouterr().out.splitlines()
    assert "student 0.500  regression 0.2500" in before
    assert "student 0.500" in after and "regression" not in after


@pytest.mark.parametrize("resumed_at", [0, 3])
def test_the_time_left_after_the_warm_up_is_of_the_updates_after_it(
    resumed_at: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Updates of the warm-up take 2 s, the head start 10 s, updates after it 6 s: after the fifth 36 s are left."""
    now, done = [0.0], [resumed_at]
    monkeypatch.setattr("evaluation.callbacks.progress.time.monotonic", lambda: now[0])
    monkeypatch.setattr(progress, "counts_of", lambda trainer: SimpleNamespace(updates=done[0]))
    trainer: Any = SimpleNamespace(max_steps=-1, log_every_n_steps=100)
    bar, module = ProgressBar(line_seconds=0.0), WarmedUp()
    bar.on_train_start(trainer, module)
    for update in range(resumed_at + 1, 6):
        now[0] += {4: 16.0, 5: 6.0}.get(update, 2.0)
        done[0] = update
        bar.on_train_batch_end(trainer, module, None, None, 0)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    warmed = 6 if resumed_at == 0 else 0
    if warmed:
        assert lines[2] == "student updates 3/11 0:00:06, 0:00:16 left"
    assert lines[-2:] == [
        f"student updates 4/11 0:00:{warmed + 16}",
        f"student updates 5/11 0:00:{warmed + 22}, 0:00:36 left",
    ]


def test_report_has_the_contracts_keys(world: Path, toy_networks: dict[str, str], tmp_path: Path) -> None:
    def callbacks() -> list[Callback]:
        return [
            DistillationMetrics(2),
            Report(teacher_steps=[3, 1], teacher_results=str(tmp_path / "none.json")),
        ]

    fit(world, tmp_path, callbacks(), updates=2)
    report = json.loads((tmp_path / "report.json").read_text())
    contract = {
        "seconds",
        "student_updates",
        "student",
        "student_before",
        "teacher",
        "real_vs_real",
        "protocol",
        "versions",
    }
    assert contract <= set(report)
    row = {"nfe", "fid", "clip_score", "caption_accuracy", "ms_per_image"}
    for scores in (report["student"], report["student_before"], *report["teacher"].values()):
        assert row <= set(scores)
        assert 0 <= scores["caption_accuracy"] <= 1
    assert list(report["teacher"]) == ["3", "1"]
    assert report["teacher"]["3"]["nfe"] == 3
    assert report["student"]["nfe"] == 1
    assert report["student_updates"] == 2
    assert report["student"]["fid"] != report["student_before"]["fid"]
    assert report["real_vs_real"]["fid"] > 0
    for name in ("samples.png", "progress.png"):
        assert Image.open(tmp_path / name).size[0] > 300

    # A second run finds the teacher's figures beside the first one's report, and does not measure them again.
    stored = json.loads((tmp_path / "teacher.json").read_text())
    stored["toy"]["teacher"]["3"]["fid"] = 123.0
    (tmp_path / "teacher.json").write_text(json.dumps(stored))
    trainer, module = fit(world, tmp_path, callbacks(), updates=2)
    again = json.loads((tmp_path / "report.json").read_text())
    assert again["teacher"]["3"]["fid"] == 123.0
    assert again["teacher"]["1"]["fid"] == report["teacher"]["1"]["fid"]
    assert again["student"]["fid"] == report["student"]["fid"]
    module.student.timesteps = [999, 499]
    assert trainer.callbacks[1]._student(trainer, module)["nfe"] == 2


def test_a_missing_network_is_reported_before_training(
    world: Path, toy_networks: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError, match=r"open_clip_config\.json is missing"):
        fit(world, tmp_path, [DistillationMetrics(1, clip=str(tmp_path))], updates=1)


def test_numbers_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        DistillationMetrics(every_n_student_updates=0)
    with pytest.raises(ValueError, match="no protocol named 'coco'; there are toy, toy-val"):
        DistillationMetrics(protocol="coco")


@pytest.mark.parametrize(
    ("warmup", "expected"),
    [
        (300, {"warm-up": [0, 5], "distillation": [5, 8]}),  # from the warm-up's last point on
        (500, {"warm-up": [0, 5, 8]}),
        (0, {"distillation": [0, 5, 8]}),
    ],
)
def test_the_progress_picture_tells_distillation_from_the_warm_up(
    warmup: int, expected: dict[str, list[float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    history = [
        {"student_updates": updates, "seconds": 60 * minutes, "shape_score": 0.8, "caption_accuracy": 0.9}
        for updates, minutes in ((0, 0), (300, 5), (500, 8))
    ]
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    progress_curves(history, {"shape_score": 0.92}, "teacher", tmp_path / "progress.png", warmup)
    left, right = drawn[0].axes
    lines = {str(line.get_label()): np.asarray(line.get_xdata()).tolist() for line in right.lines}
    assert lines == {f"one-step student, {name}": minutes for name, minutes in expected.items()}
    assert [line.get_label() for line in left.lines][-1] == "teacher"
