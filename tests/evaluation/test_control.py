"""Control adherence of a ControlNet: sets, figures with known values, the callback, and refusals."""

from __future__ import annotations

import json
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from PIL import Image
from torch import Tensor

from data.conditions import Canny
from data.prepare.images.image_files import encode_image
from data.shards.writer import ShardWriter
from data.toy.background_bar import BackgroundBar
from data.toy.datamodule import ToyDataModule
from evaluation.callbacks.control_metrics import ControlMetrics, condition_of
from evaluation.callbacks.sample_grids import SampleGrids
from evaluation.evaluate import EvaluateOptions
from evaluation.evaluate import main as evaluate
from evaluation.images.control_sets import (
    ControlledPrompts,
    ReadCondition,
    ShardControlSet,
    ToyControlSet,
    adherence_of,
    made_by,
    measurable,
)
from evaluation.images.controlled_pipeline import ControlledPipeline
from evaluation.images.samples import ModelSamples
from evaluation.metrics.control_adherence import EdgeAdherence
from evaluation.runner.control import control_markdown, measure_control
from evaluation.runner.control_quality import QualityMetrics
from sdxs_lightning.core.errors import UserError
from sdxs_lightning.core.latents import from_uint8, to_uint8
from sdxs_lightning.core.model_hash import hash_model, hash_weights
from sdxs_lightning.core.seeding import Stream, normal
from sdxs_lightning.export import export_pipeline, write_adapters
from sdxs_lightning.families.sd import StableDiffusion
from sdxs_lightning.networks.condition_readers import LearnedReader, ReaderNetwork, SoftEdgeReader
from sdxs_lightning.networks.controlled import ControlledFakeScore, ControlledStudent
from sdxs_lightning.networks.controlnet import STEM_WIDTHS, controlnet_from_unet, save_controlnet
from sdxs_lightning.networks.lora import LoRA, add_lora, lora_parameters
from sdxs_lightning.networks.lora_files import hash_lora
from sdxs_lightning.objectives.condition_consistency import ConditionConsistency
from sdxs_lightning.publishing.scores import _numbers_of
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
    made = made_by(condition)
    prompts = ToyControlSet("val", 30, made)
    assert quality.toy is not None
    classifier: Any = quality.toy.classifier
    adherence = partial(adherence_of, made, classifier)
    figures = measure_control({"target": target, "black": black}, prompts, adherence, quality, batch_size=13)
    found = {name: figures.values(name) for name in ("target", "black")}
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


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny base, and shards of its samples."""
    folder = tmp_path_factory.mktemp("tiny")
    return save_base("sd-v_prediction", folder), save_shards(folder / "shards")


def module_of(base: Path, reader: Any = None) -> ControlNetDistillation:
    sgd = partial(torch.optim.SGD, lr=0.1)
    return ControlNetDistillation(
        family_of(base),
        ControlledStudent(sgd),
        ControlledFakeScore(sgd),
        UpdateSchedule(max_student_updates=2, fake_score_updates_per_student_update=1),
        objectives={"condition": ConditionConsistency(reader or SoftEdgeReader())},
        ema_decay=0.0,
    )


def test_the_callback_measures_bounds_once_and_draws_grids(
    tiny: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, shards = tiny
    module = module_of(base)
    calls = {"controlled": 0, "plain": 0, "decoded": 0}
    generate, encode = module.generate, module.family.encode

    def generated(captions: list[str], noise: Tensor, control_images: Tensor | None = None) -> Tensor:
        calls["plain" if control_images is None else "controlled"] += 1
        return generate(captions, noise, control_images=control_images)

    def encoded(images: Tensor) -> Tensor:
        calls["decoded"] += 1
        return encode(images)

    monkeypatch.setattr(module, "generate", generated)
    monkeypatch.setattr(module.family, "encode", encoded)
    callback = ControlMetrics("canny", every_n_student_updates=1, samples=5, batch_size=3)
    contents: Any = ["latents", "control_images"]
    fit(module, shards, 2, contents=contents, callbacks=[callback], default_root_dir=tmp_path / "run")
    # Two batches in each measurement, and one for its grid; chance and ceiling in the first one alone.
    assert calls == {"controlled": 2 * 3, "plain": 2 + 2, "decoded": 2}
    lines = [json.loads(line) for line in (tmp_path / "run" / "scores.jsonl").read_text().splitlines()]
    assert [line["student_updates"] for line in lines] == [1, 2]
    prompts = ToyControlSet("val", 5, Canny()).batch(range(5))
    noise = normal(0, Stream.EVALUATION, torch.arange(5), module.family.latent_shape())
    targets = from_uint8(prompts.targets_uint8)
    images = {
        "": generate(prompts.captions, noise, control_images=prompts.controls_uint8.float() / 255),
        "_chance": generate(prompts.captions, noise),
        "_ceiling": module.family.decode(encode(targets)),
    }
    names = {"edge_f1", "fid", "clip_score", "caption_accuracy"}
    for which, made in images.items():
        edges = EdgeAdherence(Canny(), tolerance_px=1)
        edges.update_with(to_uint8(made), prompts.controls_uint8)
        assert lines[-1][f"edge_f1{which}"] == pytest.approx(float(edges.compute()))
        assert all({f"{name}{which}" for name in names} <= set(line) for line in lines)
    assert lines[0]["condition"] == "Canny(low=100, high=200, vary=0.0)"
    assert len(list((tmp_path / "run" / "control").glob("update_*.png"))) == 2


def test_a_callback_measures_with_the_settings_of_the_datas_condition() -> None:
    made = condition_of(ToyDataModule(condition=Canny(10, 30, vary=1.0)))
    measured = measurable(made)
    assert isinstance(measured, Canny) and (measured.low, measured.high, measured.vary) == (10, 30, 0.0)
    # Thresholds of 100 and 200 find no edge of a faint square; those of the data do.
    faint = torch.full((1, 3, 32, 32), 128, dtype=torch.uint8)
    faint[:, :, 8:24, 8:24] = 140
    wanted = torch.from_numpy(measured(faint[0].permute(1, 2, 0).numpy())).permute(2, 0, 1)[None]
    assert wanted.max() == 255
    scores = []
    for condition in (measured, Canny()):
        metric = adherence_of(condition, None)
        metric.update_with(faint, wanted)
        scores.append(float(metric.compute()))
    assert scores == [1.0, 0.0]


def test_a_reader_that_is_trained_through_does_not_measure(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    base, shards = tiny
    for seed in (0, 1):
        ReaderNetwork(widths=(8, 16), seed=seed).save_pretrained(tmp_path / str(seed))
    contents: Any = ["latents", "control_images"]
    images = tmp_path / "images"
    with ShardWriter(images, samples_per_shard=2) as writer:
        for i, control in enumerate(ToyControlSet("val", 2, Canny()).batch(range(2)).controls_uint8):
            frame = encode_image(Image.fromarray(control.permute(1, 2, 0).numpy()), "png", 100)
            writer.write({"txt": f"{i}", "png": frame, "cond.png": frame})
    for seed, message in ((0, "the student trains through condition_reader"), (1, None)):
        module = module_of(base, LearnedReader(str(tmp_path / "0")))
        callback = ControlMetrics(
            f"reader:{tmp_path / str(seed)}", str(images), make_conditions=False, protocol="clean", samples=2
        )
        with pytest.raises(UserError, match=message) if message else nullcontext():
            fit(module, shards, 1, contents=contents, callbacks=[callback], default_root_dir=tmp_path)


def test_the_command_measures_what_it_was_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LoRA, timesteps, scheduler and precision reach the pipeline; the file has what a card of the ControlNet needs."""
    family = StableDiffusion("data/toy/base", 699)
    unet = family.load_unet()
    export_pipeline(unet, family, tmp_path / "student")
    controlnet = controlnet_from_unet(unet, (16, 32))
    with torch.no_grad():
        for parameter in controlnet.controlnet_mid_block.parameters():
            parameter.add_(0.3)
    save_controlnet(controlnet, tmp_path / "controlnet", torch.float32)
    add_lora(unet, LoRA(rank=2, targets=("to_q",)))
    with torch.no_grad():
        for parameter in lora_parameters(unet).values():
            parameter.add_(0.3)
    write_adapters(unet, None, tmp_path / "lora", torch.float32, first_rank=True)
    student, folder = str(tmp_path / "student"), str(tmp_path / "controlnet")
    given = ["--model", student, "--control", "toy", "--controlnet", folder, "--condition", "canny"]
    given += ["--protocol", "toy-val", "--samples", "2", "--device", "cpu"]

    loaded: list[ControlledPipeline] = []
    load = ControlledPipeline.load

    def loading(*arguments: Any) -> ControlledPipeline:
        loaded.append(load(*arguments))
        return loaded[-1]

    monkeypatch.setattr(ControlledPipeline, "load", loading)

    def measured(*more: str) -> dict[str, Any]:
        evaluate([*given, *more, "--out", str(tmp_path / "control.json")])
        return json.loads((tmp_path / "control.json").read_text())  # type: ignore[no-any-return]

    plain = measured("--conditioning_scales", "0", "1")
    assert plain["conditioning_scale"]["0"] == plain["chance"] != plain["conditioning_scale"]["1"]
    assert plain["controlnet_sha256"] == hash_weights(tmp_path / "controlnet")
    assert (plain["guidance_scale"], plain["precision"], plain["nfe"]) == (1.0, "fp32", 1)
    assert {"edge_f1", "fid", "clip_score", "caption_accuracy"} <= set(plain["metrics"])
    numbers = _numbers_of(plain, "controlnet", Path("control.json"), "control.json")  # what a card reads
    assert {one.metric for one in numbers} == set(plain["conditioning_scale"]["1"])
    for one in numbers:
        assert one.value == plain["conditioning_scale"]["1"][one.metric]
        assert (one.samples, one.steps, one.guidance_scale, one.scale) == (2, 1, 1.0, 1.0)
        assert one.partner_hash == hash_model(tmp_path / "student") and one.protocol == "toy-val"
    changed = measured(
        *("--conditioning_scales", "0.5", "--lora", str(tmp_path / "lora"), "--lora_scale", "0.7"),
        *("--timesteps", "600", "300", "--scheduler", "ddpm", "--guidance_scale", "2"),
    )
    assert changed["lora_sha256"] == hash_lora(tmp_path / "lora") and changed["lora_scale"] == 0.7
    assert (changed["timesteps"], changed["scheduler"], changed["nfe"]) == ([600, 300], "ddpm", 2)
    assert changed["guidance_scale"] == 2.0
    half = load(ModelSamples(student, (), precision="bf16"), folder, torch.device("cpu")).pipeline
    assert half.unet.dtype == half.controlnet.dtype == torch.bfloat16
    before, after = (one.pipeline for one in loaded)
    assert type(after.scheduler).__name__ == "DDPMScheduler"
    assert after.scheduler.timesteps.tolist() == [600, 300]  # those of the last call
    name = next(one for one in before.unet.state_dict() if one.endswith("to_q.weight"))
    weights = [one.unet.state_dict()[name].float() for one in (before, after)]
    assert (weights[1] - weights[0]).abs().max() > 0.05
    hashes = {one["metrics"]["edge_f1"]["hash"] for one in (plain, changed)}
    assert len(hashes) == 2  # of two conditioning scales


def test_a_stage_or_protocol_that_does_not_fit_the_callback_is_refused(tiny: tuple[Path, Path]) -> None:
    module: Any = module_of(tiny[0])
    with pytest.raises(UserError, match="control toy goes with protocol toy or toy-val, got clean"):
        ControlMetrics("canny", protocol="clean").setup(SimpleNamespace(), module, "fit")  # type: ignore[arg-type]
    module.family.resolution = 64
    with pytest.raises(UserError, match="the images of `control` 'toy' are 32x32, and the student's 64x64"):
        ControlMetrics("canny").setup(SimpleNamespace(), module, "fit")  # type: ignore[arg-type]
    with pytest.raises(
        UserError, match="ControlMetrics needs a ControlNetDistillation, got a LightningModule"
    ):
        ControlMetrics("canny").setup(SimpleNamespace(), LightningModule(), "fit")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="needs a OneStepDistillation, got a LightningModule; remove it"):
        SampleGrids().on_train_start(SimpleNamespace(), LightningModule())  # type: ignore[arg-type]


def test_images_of_nan_and_of_other_sizes_end_the_measurement(tmp_path: Path) -> None:
    unet = StableDiffusion("data/toy/base").load_unet()
    controlnet = controlnet_from_unet(unet, (16, 32))
    torch.nn.init.constant_(controlnet.controlnet_mid_block.bias, float("nan"))
    save_controlnet(controlnet, tmp_path)
    made = ControlledPipeline.load(ModelSamples("data/toy/student", ()), str(tmp_path), torch.device("cpu"))
    prompts = ToyControlSet("val", 2, Canny()).batch(range(2))
    with pytest.raises(UserError, match="2 of 2 images at conditioning scale 0 have NaN or infinity"):
        made.at(0.0)(prompts, torch.arange(2))
    odd = prompts._replace(controls_uint8=prompts.controls_uint8[..., :31])
    with pytest.raises(UserError, match="the set's images are 32x31, and the model draws multiples of 2"):
        made(odd, torch.arange(2))
    for stem, message in (((8, 8, 8), "4 times smaller"), (STEM_WIDTHS, "8 times smaller")):
        save_controlnet(controlnet_from_unet(unet, stem), tmp_path)
        with pytest.raises(UserError, match=rf"--controlnet '.*' makes condition images {message}"):
            ControlledPipeline.load(ModelSamples("data/toy/student", ()), str(tmp_path), torch.device("cpu"))


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--control needs --model, --controlnet and --condition"):
        EvaluateOptions(model="x", control="toy")
    with pytest.raises(ValueError, match="--controlnet and --condition go with --control"):
        EvaluateOptions(model="x", controlnet="y")
    whole: dict[str, Any] = {"model": "x", "control": "y", "controlnet": "z", "condition": "canny"}
    refused: dict[str, Any] = {"captions": "a", "save_images": Path("a"), "work": Path("a"), "processes": 2}
    for name, value in refused.items():
        with pytest.raises(ValueError, match=f"--{name} does not go with --control"):
            EvaluateOptions(**whole | {name: value})
    with pytest.raises(ValueError, match="--image_px does not go with --control toy"):
        EvaluateOptions(**whole | {"control": "toy", "image_px": 64})
    refused = {"make_conditions": True, "conditioning_scales": (0.5,)}
    for name, value in refused.items():
        with pytest.raises(ValueError, match=f"--{name} goes with --control"):
            EvaluateOptions(model="x", **{name: value})
    refused = {"metrics": ("kid",), "reference": "r.npz", "weights": ("inception=a",)}
    for name, value in refused.items():
        with pytest.raises(ValueError, match=f"protocol toy is the toy world's own, .* leave out --{name}"):
            EvaluateOptions(**whole | {name: value})
    with pytest.raises(ValueError, match="--reference is 'r.npz', .* of which none compares with it"):
        EvaluateOptions(**whole | {"reference": "r.npz", "protocol": "clean", "metrics": ("clip_score",)})
    for out in (tmp_path, tmp_path / "x.png", tmp_path / "x.html", tmp_path / "x.md"):
        with pytest.raises(ValueError, match="--out is .* and the result is a .json file"):
            EvaluateOptions(model="x", out=out)
    for count in (0, -1):
        with pytest.raises(ValueError, match=f"samples of the callback ControlMetrics .* got {count}"):
            ControlMetrics(samples=count)
        with pytest.raises(ValueError, match=f"batch_size of the callback ControlMetrics .* got {count}"):
            ControlMetrics(batch_size=count)
    reader = ReadCondition(str(tmp_path))
    with pytest.raises(UserError, match="only guesses them from the images; take shards with cond.png"):
        ToyControlSet("val", 2, reader)
    with pytest.raises(UserError, match="only guesses them .* leave out `make_conditions`"):
        ShardControlSet("nowhere", None, None, reader)
    ReaderNetwork(channels=4, widths=(4, 4)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="reads conditions of 4 channels, and those of images have 3"):
        reader(np.zeros((32, 32, 3), np.uint8))
    with pytest.raises(UserError, match="`condition` 'hed' is none of canny"):
        made_by("hed")
    with pytest.raises(UserError, match=r"conditions are not made by data\.condition, so say how"):
        condition_of(None)
    with pytest.raises(UserError, match="background_bar is the toy world's"):
        adherence_of(BackgroundBar(), None)
    with pytest.raises(UserError, match=r"fid with --control needs --reference FILE\.npz, got None"):
        QualityMetrics("clean", torch.device("cpu"), ["fid"])
