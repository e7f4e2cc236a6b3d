"""The tables that measure: networks and LoRAs once each, size conditions, and what the commands refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import avg_pool2d, interpolate

from data.toy.rendered import render_batch
from evaluation.benchmarks.tables import lora as toy_lora
from evaluation.benchmarks.tables.__main__ import main
from evaluation.benchmarks.tables.options import TeacherOptions, UNetsOptions
from evaluation.benchmarks.tables.size_conditioning import sampled_images, sharpness
from evaluation.callbacks.run_report import Report
from evaluation.protocols.protocols import PROTOCOLS, get_protocol
from evaluation.runner.teacher_scores import GUIDANCE_SCALE, STEPS
from evaluation.runner.teacher_scores import RESULTS as TEACHER_RESULTS
from sdxs_lightning.core.model_hash import hash_weights
from sdxs_lightning.families.sd import StableDiffusion
from sdxs_lightning.families.sdxl import StableDiffusionXL
from sdxs_lightning.networks.denoiser import Denoiser
from sdxs_lightning.networks.lora import LoRA, add_lora
from sdxs_lightning.networks.lora_files import live_adapters, write_lora
from sdxs_lightning.pairs.target_sampler import TargetSampler
from tests.helpers.refusals import refusal
from tests.helpers.tiny import save_tiny_sd, save_tiny_sdxl, tiny_sd_unet
from tests.helpers.tiny_run import ROOT
from tests.networks.test_lora import move


def test_unets_are_scored_once_per_weights(world: Path, toy_networks: dict[str, str], tmp_path: Path) -> None:
    tiny_sd_unet(seed=5).save_pretrained(tmp_path / "other")
    same, out = world / "sd-epsilon" / "unet", tmp_path / "results" / "table.json"

    def rows(*networks: str) -> dict[str, Any]:
        line = ["--base", str(world / "sd-epsilon"), "--steps", "2", "--out", str(out)]
        main(["unets", *line, "--unet", *networks])
        found: dict[str, Any] = json.loads(out.read_text())["rows"]
        return found

    first = rows(f"same={same}", f"other={tmp_path / 'other'}")
    assert list(first) == ["base", "same", "other"]
    assert first["same"]["steps"]["2"]["fid"] == first["base"]["steps"]["2"]["fid"]
    assert first["other"]["steps"]["2"]["fid"] != first["base"]["steps"]["2"]["fid"]
    assert first["other"]["parameters"] == sum(p.numel() for p in tiny_sd_unet().parameters())

    # Stored scores of the same weights stay; other weights under an old name are measured.
    stored = json.loads(out.read_text())
    stored["rows"]["base"]["steps"]["2"]["fid"] = stored["rows"]["other"]["steps"]["2"]["fid"] = 77.0
    out.write_text(json.dumps(stored))
    again = rows(f"other={same}")
    assert again["base"]["steps"]["2"]["fid"] == 77.0
    assert again["other"]["steps"]["2"]["fid"] == first["base"]["steps"]["2"]["fid"]


def test_the_teacher_is_scored_once(
    world: Path, toy_networks: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results" / "teacher.json"

    def run(*more: str) -> dict[str, Any]:
        line = f"teacher --base {world / 'sd-epsilon'} --out {out} --protocol toy --batch_size 4".split()
        main([*line, *more])
        found: dict[str, Any] = json.loads(out.read_text())
        return found

    first = run("--steps", "2", "1")["toy"]
    assert list(first["teacher"]) == ["2", "1"]
    measured = {
        "nfe",
        "fid",
        "clip_score",
        "caption_accuracy",
        "attribute_accuracy",
        "shape_score",
        "clean_images",
    }
    assert set(first["teacher"]["2"]) == measured | {"ms_per_image"}
    one_call = first["one_call_ms_per_image"]
    ratios = {steps: row["ms_per_image"] / one_call for steps, row in first["teacher"].items()}
    assert first["latency_ratio"] == pytest.approx(ratios) and min(ratios.values()) > 0
    assert first["base_sha256"] == hash_weights(world / "sd-epsilon")
    assert first["protocol"]["fingerprint"] == PROTOCOLS["toy"].fingerprint()
    assert "| base, 2 steps |" in capsys.readouterr().out

    first["teacher"]["2"]["fid"] = 77.0
    out.write_text(json.dumps({"toy": first, "other": {"kept": True}}))
    second = run("--steps", "2", "3")
    assert second["toy"]["teacher"]["2"]["fid"] == 77.0
    assert set(second["toy"]["teacher"]) == {"1", "2", "3"}
    assert second["other"] == {"kept": True}

    for change in (["--guidance_scale", "4"], ["--samples", "6"]):
        out.write_text(json.dumps({"toy": first}))
        with pytest.warns(UserWarning, match="another base or protocol 'toy'"):
            other = run("--steps", "2", *change)
        assert other["toy"]["teacher"]["2"]["fid"] != 77.0


def test_the_teachers_scores_are_kept_one_by_one(
    world: Path,
    toy_networks: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its 50 steps take an hour; stopped there, the command continues with what it has."""
    out, measured = tmp_path / "teacher.json", list[str]()

    def measure(self: object, label: str, *given: object) -> dict[str, float]:
        measured.append(label)
        if label == "2 steps":
            raise KeyboardInterrupt
        return {"fid": 1.0}

    monkeypatch.setattr("evaluation.benchmarks.tables.scores.Scorer.__call__", measure)
    line = ["teacher", "--base", str(world / "sd-epsilon"), "--out", str(out), "--protocol", "toy"]
    for steps, expected in (
        ("1", ["real images", "reconstructions", "1 steps", "2 steps"]),
        ("3", ["3 steps", "2 steps"]),
    ):
        measured.clear()
        with pytest.raises(SystemExit):
            main([*line, "--steps", steps, "2"])
        assert measured == expected
    assert set(json.loads(out.read_text())["toy"]["teacher"]) == {"1", "3"}

    for damaged in ("[]", '{"toy": "x"}', '{"toy": {"protocol": {}}}'):
        out.write_text(damaged)
        assert refusal(main, line, capsys).startswith("tables teacher: ")
        with pytest.raises(ValueError, match="teacher.json"):  # before the training
            Report(teacher_results=str(out)).setup(None, None, "fit")  # type: ignore[arg-type]
        assert out.read_text() == damaged


def test_a_device_that_is_none_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(main, ["quality", "--device", "bogus", "--out", tmp_path / "quality.json"], capsys)
    assert (
        said == "tables quality: --device is 'bogus', but must be auto, cpu, cuda or another device of torch."
    )


def test_the_default_teacher_is_that_of_run_reports() -> None:
    options = TeacherOptions()
    assert (options.steps, options.guidance_scale) == (STEPS, GUIDANCE_SCALE)
    assert (ROOT / options.out, UNetsOptions(out=options.out).guidance_scale) == (
        TEACHER_RESULTS,
        GUIDANCE_SCALE,
    )


def test_loras_are_scored_by_scale_and_kept(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base, out = ROOT / "data" / "toy" / "base", tmp_path / "lora.json"
    unet = add_lora(StableDiffusion(str(base)).load_unet(), LoRA(rank=1))
    move(unet, 0.1)
    for seed in (3, 4):
        (tmp_path / f"seed{seed}").mkdir()
        write_lora(tmp_path / f"seed{seed}", live_adapters(unet.state_dict(), None))
    arguments = [
        "lora",
        "--student",
        str(base),
        "--lora",
        f"mine={tmp_path}/seed{{seed}}",
        f"again={tmp_path}/seed3",
        "--seeds",
        "3",
        "4",
        "--diversity_prompts",
        "1",
        "--samples",
        "4",
    ]
    main([*arguments, "--scales", "0", "1", "--out", str(out)])
    # Of the libraries' own lines none: bars of loading, modules to keep in float32, text encoders without LoRA.
    assert [line.split(":")[0] for line in capfd.readouterr().err.splitlines()] == [
        "real",
        "real, textured",
        "plain",
        "mine, scale 0, seed 3",
        "mine, scale 0, seed 4",
        "mine, seed 3",
        "mine, seed 4",
        "again, seed 3",
    ]
    first = json.loads(out.read_text())
    assert list(first["rows"]) == ["real", "real, textured", "plain", "mine, scale 0", "mine", "again"]
    real, textured, plain, zero, styled, again = first["rows"].values()
    assert (styled["seeds"], again["seeds"]) == ([3, 4], [3])  # a folder without {seed} is one LoRA
    assert [again[key]["values"] for key in toy_lora.SCORES] == [
        styled[key]["values"][:1] for key in toy_lora.SCORES
    ]
    for images, share in ((real, 0.0), (textured, 1.0)):
        assert images["caption_accuracy"]["mean"] == 1.0 and images["style_accuracy"]["mean"] == share
        assert images["diversity"]["mean"] == pytest.approx(0.32, abs=0.1)
    assert [plain[key]["mean"] for key in toy_lora.SCORES] == [zero[key]["mean"] for key in toy_lora.SCORES]
    assert plain["diversity"]["mean"] != styled["diversity"]["mean"]
    for seed in (3, 4):
        first["runs"][f"mine, seed {seed}"]["diversity"] = 77.0
    out.write_text(json.dumps(first))
    main([*arguments, "--out", str(out)])
    assert (
        json.loads(out.read_text())["rows"]["mine"]["diversity"]["mean"] == 77.0
    )  # the same file is not measured again


def test_sharpness_falls_with_the_original_size() -> None:
    images = render_batch("val", 20, 0)
    half = interpolate(avg_pool2d(images.float(), 2), size=32, mode="bilinear")
    assert sharpness(half.round().to(torch.uint8)) < 0.9 * sharpness(images)
    edges = torch.tensor([0, 4, 4, 0], dtype=torch.uint8).expand(1, 3, 4, 4)
    assert sharpness(edges) == pytest.approx((8 / 3 + 0) / 2)


def test_size_conditions_reach_the_network_and_all_else_is_equal(tmp_path: Path) -> None:
    family = StableDiffusionXL(str(save_tiny_sdxl(tmp_path / "sdxl")))
    denoiser = Denoiser(family.load_unet(), family.schedule, family.prediction_type)
    settings = family, TargetSampler(denoiser, 2, 1.5), get_protocol("toy", samples=3)
    plain = sampled_images(*settings, 32, 0, batch_size=2)
    assert plain.shape == (3, 3, 32, 32) and plain.dtype == torch.uint8
    assert torch.equal(plain, sampled_images(*settings, 32, 0, batch_size=2))
    for size_px, crop_px in ((16, 0), (32, 8)):
        assert not torch.equal(plain, sampled_images(*settings, size_px, crop_px, batch_size=2))


def test_bad_input_is_one_sentence(
    toy_networks: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere, out = str(tmp_path / "nowhere"), str(tmp_path / "out.json")
    for name in ("unets", "teacher", "size_conditioning"):
        said = refusal(main, [name, "--base", nowhere, "--out", out], capsys)
        assert said.startswith(f"tables {name}: ") and "nowhere" in said, said
    base = save_tiny_sd(tmp_path / "sd")
    assert "is not conditioned on sizes" in refusal(main, ["size_conditioning", "--base", base], capsys)
    assert "--unet takes NAME=FOLDER, such as" in refusal(
        main, ["unets", "--unet", "folder", "--out", out], capsys
    )
    Path(out).write_text('{"x": 1}')
    assert "has none of differences, fid_ratio" in refusal(main, ["show", out], capsys)
    Path(out).write_text("[]")
    assert "out.json is not a score file" in refusal(main, ["show", out], capsys)


def test_image_to_image_refuses_a_model_before_it_measures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student, out = str(ROOT / "data/toy/student"), tmp_path / "scores.json"
    for given, message in (
        (["--student", "nowhere"], "there is no model in 'nowhere'"),
        (["--student", student, "--single", str(ROOT / "data/toy/base")], "is a base of many steps"),
    ):
        line = ["image_to_image", *given, "--samples", "2", "--out", str(out)]
        assert message in refusal(main, line, capsys)
        assert not out.exists()
