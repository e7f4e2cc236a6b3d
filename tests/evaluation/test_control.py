"""Control adherence of a ControlNet: sets, figures with known values, the callback, and refusals."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data.conditions import Sketch
from data.toy.datamodule import ToyDataModule
from evaluation.callbacks.control_metrics import ControlMetrics, condition_of
from evaluation.evaluate import EvaluateOptions
from evaluation.images.control_sets import ControlledPrompts, ToyControlSet, adherence_of
from evaluation.runner.control import QualityMetrics, control_markdown, measure_control
from sdxs_lightning.core.errors import UserError
from sdxs_lightning.networks.condition_readers import SoftEdgeReader
from sdxs_lightning.networks.controlled import ControlledFakeScore, ControlledStudent
from sdxs_lightning.objectives.condition_consistency import ConditionConsistency
from sdxs_lightning.stages.controlnet.distillation import ControlNetDistillation
from sdxs_lightning.stages.distillation.update_schedule import UpdateSchedule
from tests.helpers.tiny_distillation import family_of, fit, save_base, save_shards


@pytest.fixture(scope="module")
def quality() -> QualityMetrics:
    return QualityMetrics("toy-val", torch.device("cpu"))


def target(prompts: ControlledPrompts, sample_ids: Tensor) -> Tensor:
    return prompts.targets_uint8


def black(prompts: ControlledPrompts, sample_ids: Tensor) -> Tensor:
    return torch.zeros_like(prompts.targets_uint8)


@pytest.mark.parametrize(
    ("condition", "name"), [("canny", "edge_f1"), ("background_bar", "background_accuracy")]
)
def test_the_target_itself_follows_its_condition_and_a_black_image_does_not(
    quality: QualityMetrics, condition: str, name: str
) -> None:
    prompts = ToyControlSet("val", 30, condition)
    assert quality.toy is not None
    classifier: Any = quality.toy.classifier
    adherence = partial(adherence_of, condition, classifier)
    found = measure_control({"target": target, "black": black}, prompts, adherence, quality, batch_size=13)
    assert found["target"][name] >= (1.0 if condition == "canny" else 0.95)
    black_backgrounds = 0.4  # a fifth of the toy world's are black
    assert found["black"][name] <= (0.0 if condition == "canny" else black_backgrounds)
    assert found["target"]["caption_accuracy"] > 0.95 and found["black"]["caption_accuracy"] < 0.1


def test_the_table_has_chance_first_and_ceiling_last() -> None:
    result = {
        "condition": "canny",
        "chance": {"edge_f1": 0.2},
        "ceiling": {"edge_f1": 0.9},
        "conditioning_scale": {"1": {"edge_f1": 0.7}},
    }
    lines = control_markdown(result).splitlines()
    assert lines[0] == "| canny | edge_f1 |"
    assert lines[2:] == [
        "| without control (chance) | 0.2 |",
        "| conditioning scale 1 | 0.7 |",
        "| autoencoder (ceiling) | 0.9 |",
    ]


def test_the_callback_measures_bounds_once_and_draws_grids(tmp_path: Path) -> None:
    sgd = partial(torch.optim.SGD, lr=0.1)
    module = ControlNetDistillation(
        family_of(save_base("sd-v_prediction", tmp_path)),
        ControlledStudent(sgd),
        ControlledFakeScore(sgd),
        UpdateSchedule(max_student_updates=2, fake_score_updates_per_student_update=1),
        objectives={"condition": ConditionConsistency(SoftEdgeReader(), distance="mse")},
        ema_decay=0.0,
    )
    callback = ControlMetrics("canny", every_n_student_updates=1, samples=5, batch_size=3)
    contents: Any = ["latents", "control_images"]
    shards = save_shards(tmp_path / "shards")
    fit(module, shards, 2, contents=contents, callbacks=[callback], default_root_dir=tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "scores.jsonl").read_text().splitlines()]
    assert [line["student_updates"] for line in lines] == [1, 2]
    assert all(
        {"edge_f1", "edge_f1_chance", "edge_f1_ceiling", "fid", "caption_accuracy"} <= set(line)
        for line in lines
    )
    assert lines[0]["edge_f1_ceiling"] == lines[1]["edge_f1_ceiling"] == callback.bounds["edge_f1_ceiling"]
    assert len(list((tmp_path / "run" / "control").glob("update_*.png"))) == 2


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="--control needs --model, --controlnet and --condition"):
        EvaluateOptions(model="x", control="toy")
    with pytest.raises(ValueError, match="--controlnet and --condition go with --control"):
        EvaluateOptions(model="x", controlnet="y")
    with pytest.raises(UserError, match="--condition 'hed' is none of canny"):
        adherence_of("hed", None)
    with pytest.raises(UserError, match=r"conditions are not made by data\.condition, so say how"):
        condition_of(None)
    assert condition_of(ToyDataModule(condition=Sketch())) == "sketch"
    assert condition_of(ToyDataModule(background_bar=True)) == "background_bar"
    with pytest.raises(UserError, match="background_bar is the toy world's"):
        adherence_of("background_bar", None)
    with pytest.raises(UserError, match=r"fid with --control needs --reference FILE\.npz, got None"):
        QualityMetrics("clean", torch.device("cpu"), ["fid"])
