"""Metrics of published protocols while a student trains, the best checkpoint by them, grids for other loggers."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from PIL import Image

from data.shards.datamodule import ShardDataModule
from evaluation.callbacks.best_checkpoint import BestCheckpoint
from evaluation.callbacks.image_metrics import ImageMetrics, stepped
from evaluation.callbacks.sample_grids import SampleGrids
from evaluation.callbacks.score_curve import SCORES, ScoreCurve
from evaluation.evaluate import main
from evaluation.protocols.protocols import IMAGE_PROTOCOLS
from sdxs_lightning.core.errors import UserError
from sdxs_lightning.export import export_pipeline
from sdxs_lightning.stages.distillation.step import OneStepDistillation
from sdxs_lightning.stages.distillation.update_schedule import UpdateSchedule
from tests.evaluation.test_callbacks import fit
from tests.helpers.metric_networks import random_images
from tests.helpers.ranks.image_metrics_worker import SMALL, callback, made, measure_share
from tests.helpers.ranks.processes import in_ranks
from tests.helpers.tiny_distillation import distillation

CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The protocol of the worker, for one test."""
    monkeypatch.setitem(IMAGE_PROTOCOLS, "small", SMALL)
    monkeypatch.setattr("evaluation.evaluate.PROTOCOL_NAMES", ("toy", "small"))


def test_training_and_command_line_give_one_number_under_one_hash(
    world: Path, small: None, tmp_path: Path
) -> None:
    metrics = callback(
        world, tmp_path, every_n_student_updates=2, batch_size=7, metrics=["fid", "clip_score"]
    )
    _, module = fit(world, tmp_path / "run", [metrics], updates=2)
    assert [point["student_updates"] for point in metrics.history] == [2]
    line = json.loads((tmp_path / "run" / SCORES).read_text())
    assert (line["fid"], line["protocol"]) == (metrics.history[0]["fid"], "small")
    assert line["estimates"]["fid"]["low"] < line["fid"] < line["estimates"]["fid"]["high"]

    unet, timestep = module.ema.denoiser.unet, module.ema.conditioning_timestep
    folder = export_pipeline(unet, module.family, tmp_path / "pipeline", timestep, torch.float32)
    clip = world / "clip"
    main(
        ["--model", str(folder), "--captions", str(tmp_path / "captions.txt"), "--protocol", "small",
         "--metrics", "fid", "clip_score", "--reference", str(tmp_path / "real.npz"), "--device", "cpu",
         "--weights", f"clip_image={clip}", f"clip_text={clip}", "--out", str(tmp_path / "out.json")]
    )  # fmt: skip
    result = json.loads((tmp_path / "out.json").read_text())
    assert {name: entry["hash"] for name, entry in result["metrics"].items()} == line["hash"]
    # A grey level may tip over where the two paths round differently.
    assert result["fid"] == pytest.approx(line["fid"], rel=1e-3)
    assert result["clip_score"] == pytest.approx(line["clip_score"], abs=0.05)
    assert result["metrics"]["fid"]["low"] == pytest.approx(line["estimates"]["fid"]["low"], rel=1e-2)


@pytest.mark.timeout(600)
def test_ranks_measure_what_one_process_does(world: Path, small: None, tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()
    metrics = callback(world, tmp_path / "alone", batch_size=31)
    metrics.setup(None, None, "fit")  # type: ignore[arg-type]
    alone = {name: value.as_dict() for name, value in metrics.estimates(made, CPU).items()}
    assert set(alone) == {"fid", "cmmd", "clip_score"}
    ended = in_ranks(measure_share, (world, tmp_path), tmp_path)
    assert [rank.code for rank in ended] == [0, 0], ended[0].said[-3000:]
    for rank in range(2):
        seen = json.loads((tmp_path / f"rank{rank}.json").read_text())
        for name, estimate in alone.items():
            # Features differ by float32 rounding between batch sizes.
            wanted = dict(estimate)
            assert seen[name].pop("left_out", []) == pytest.approx(list(wanted.pop("left_out", ())), rel=1e-3)
            assert seen[name] == pytest.approx(wanted, rel=1e-4), (rank, name)


def test_what_is_missing_is_reported_before_training(world: Path, small: None, tmp_path: Path) -> None:
    metrics = callback(world, tmp_path)
    metrics.reference = str(tmp_path / "nowhere.npz")
    with pytest.raises(UserError, match=r"needs the reference file .*nowhere\.npz"):
        fit(world, tmp_path / "run", [metrics], updates=1)
    metrics.reference = None
    with pytest.raises(UserError, match="fid needs `reference`, the npz of"):
        fit(world, tmp_path / "run", [metrics], updates=1)
    with pytest.raises(UserError, match="DistillationMetrics measures under the toy world's"):
        ImageMetrics(str(tmp_path / "captions.txt"), protocol="toy")
    with pytest.raises(UserError, match="asks for 30000 prompts, but .* has 31"):
        ImageMetrics(str(tmp_path / "captions.txt"))
    assert torch.equal(stepped(random_images(2), ()), random_images(2))
    assert stepped(random_images(2), ("resize 16 bicubic",)).shape == (2, 3, 16, 16)


class Planned(ScoreCurve):
    """Scores by plan."""

    def __init__(self, scores: list[float]) -> None:
        super().__init__(1)
        self.scores = scores

    def scores_of(self, trainer: Trainer, module: OneStepDistillation) -> dict[str, float]:
        return {"fid": self.scores[len(self.history)]}

    def protocol_id(self) -> dict[str, Any]:
        return {"protocol": "planned"}

    def networks(self) -> list[Any]:
        return []


def trained(world: Path, out: Path, scores: list[float], best: BestCheckpoint, **settings: Any) -> None:
    """Distil for as many updates as there are scores, less the one at the start."""
    update_schedule = UpdateSchedule(
        max_student_updates=len(scores) - 1, fake_score_updates_per_student_update=1
    )
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=-1,
        default_root_dir=out,
        logger=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        callbacks=[best, Planned(scores)],
    )
    data = ShardDataModule(str(world / "shards"), 4)
    trainer.fit(
        distillation(world / "sd-epsilon", update_schedule=update_schedule), datamodule=data, **settings
    )


def test_the_best_checkpoint_is_kept_and_a_resumed_run_knows_it(world: Path, tmp_path: Path) -> None:
    best = BestCheckpoint()
    trained(world, tmp_path, [0.5, 3.0, 2.0, 4.0], best)
    (kept,) = (tmp_path / "best").iterdir()
    assert kept.name.startswith("update_00000002-")
    assert best.best == 2.0
    state = torch.load(kept / "state.ckpt", weights_only=False)
    assert state["callbacks"]["BestCheckpoint"] == {"best": 2.0}

    again = BestCheckpoint()
    trained(
        world, tmp_path, [0.5, 3.0, 2.0, 2.5, 1.0], again, ckpt_path=kept / "state.ckpt", weights_only=False
    )
    (kept,) = (tmp_path / "best").iterdir()
    assert kept.name.startswith("update_00000004-")
    assert again.best == 1.0
    with pytest.raises(UserError, match="holds checkpoints of an earlier run"):
        trained(world, tmp_path, [0.5, 3.0], BestCheckpoint())


class ImageLogger(CSVLogger):
    """Takes images as the W&B logger does."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.images: list[tuple[str, Image.Image, int]] = []

    def log_image(self, key: str, images: list[Image.Image], step: int) -> None:
        self.images.append((key, images[0], step))


def test_grids_reach_loggers_of_images(world: Path, toy_networks: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\na green circle\n")
    grids = SampleGrids(2, prompts=str(tmp_path / "prompts.txt"), images=2)
    assert grids.prompts == ["a red circle", "a blue square"]
    logger = ImageLogger(tmp_path)
    trainer = Trainer(
        accelerator="cpu", max_epochs=-1, default_root_dir=tmp_path, logger=logger, callbacks=[grids],
        enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False,
    )  # fmt: skip
    update_schedule = UpdateSchedule(max_student_updates=2, fake_score_updates_per_student_update=1)
    module = distillation(world / "sd-epsilon", update_schedule=update_schedule)
    trainer.fit(module, datamodule=ShardDataModule(str(world / "shards"), 4))
    assert [(key, step) for key, _, step in logger.images] == [("samples", 0), ("samples", 1)]
    assert logger.images[0][1].tobytes() != logger.images[1][1].tobytes()


@pytest.mark.parametrize("accelerator", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_nothing_stays_on_the_gpu(world: Path, small: None, tmp_path: Path, accelerator: str) -> None:
    """Measured twice, since the first time makes workspaces that stay; the CPU's run shows that the calls are right."""
    metrics = callback(world, tmp_path)
    trainer = Trainer(
        accelerator=accelerator, devices=1, max_epochs=-1, default_root_dir=tmp_path, logger=False,
        callbacks=[metrics], enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False,
    )  # fmt: skip
    update_schedule = UpdateSchedule(max_student_updates=1, fake_score_updates_per_student_update=1)
    module = distillation(world / "sd-epsilon", update_schedule=update_schedule)
    trainer.fit(module, datamodule=ShardDataModule(str(world / "shards"), 4))
    module.to("cuda" if accelerator == "gpu" else "cpu")
    allocated = []
    for _ in range(2):
        metrics.at_student_update(trainer, module)
        gc.collect()  # what Lightning's modules hold in cycles
        allocated.append(torch.cuda.memory_allocated() if accelerator == "gpu" else 0)
    assert allocated[0] == allocated[1]
    for network in metrics.networks():
        assert network.device.type == "cpu"
