"""The toy world's tables: what is measured again, what is computed from score files, and what the command refuses."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.nn.functional import avg_pool2d, interpolate

from data.prepare.pairs.options import PairOptions
from data.toy.rendered import render_batch
from evaluation.benchmarks.tables import lora as toy_lora
from evaluation.benchmarks.tables import recipe_runs
from evaluation.benchmarks.tables import scores as toy_scores
from evaluation.benchmarks.tables.__main__ import main
from evaluation.benchmarks.tables.image_to_image import other_prompts
from evaluation.benchmarks.tables.options import TeacherOptions, UNetsOptions
from evaluation.benchmarks.tables.recipe_runs import (
    MODEL,
    PRUNED,
    RECIPES,
    command,
    cpu_seconds,
    run_folder,
    train_recipe,
)
from evaluation.benchmarks.tables.score_files import (
    COMPARED,
    mean_differences,
    seed_differences,
    summarise_scores,
)
from evaluation.benchmarks.tables.scores import over_seeds
from evaluation.benchmarks.tables.size_conditioning import sampled_images, sharpness
from evaluation.protocols.protocols import PROTOCOLS, REPOSITORY, get_protocol
from evaluation.runner.teacher_scores import GUIDANCE_SCALE, STEPS
from evaluation.runner.teacher_scores import RESULTS as TEACHER_RESULTS
from sdxs_lightning.cli import TrainingCLI
from sdxs_lightning.command_line import parse_options
from sdxs_lightning.core.errors import RunStopped
from sdxs_lightning.core.model_hash import hash_weights
from sdxs_lightning.export import export_pipeline
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

RESULTS = ROOT / "evaluation" / "results"


@pytest.mark.parametrize("row", list(RECIPES))
def test_a_recipes_command_parses(
    row: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    line = command(tmp_path, row, 3)
    assert line[:2] == [sys.executable, "train.py"] and (REPOSITORY / "train.py").is_file()
    with pytest.raises(SystemExit) as end:
        TrainingCLI([*line[2:], "--print_config"])
    assert end.value.code in (0, None)
    printed = capsys.readouterr().out
    assert "seed_everything: 3" in printed and str(run_folder(tmp_path, row, 3)) in printed


def test_the_command_that_makes_the_pairs_parses(capsys: pytest.CaptureFixture[str]) -> None:
    options = parse_options(PairOptions, recipe_runs.PAIR_OPTIONS.split())
    assert (options.guidance_scale, options.count, options.batch_size) == (1.5, 8192, 64)
    assert capsys.readouterr().err == ""  # no former name


def test_a_recipe_starts_from_the_student_of_the_same_seed(tmp_path: Path) -> None:
    weights = f"{MODEL}student.init_args.weights="
    assert f"{weights}{tmp_path}/warmup/seed2/pipeline" in command(tmp_path, "dmd2", 2)
    assert f"{weights}{PRUNED}" in command(tmp_path, "pruned_warmup", 0)
    assert f"{weights}null" in command(tmp_path, "warmup", 0)


def finish(root: Path, row: str, seed: int) -> None:
    folder = run_folder(root, row, seed) / "pipeline"
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")


def test_finished_recipes_are_not_run_again_and_missing_ones_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    def pretend(root: Path, row: str, seed: int) -> list[str]:
        ran.append(row)
        folder = run_folder(root, row, seed) / "pipeline"
        code = f"import pathlib; p = pathlib.Path({str(folder)!r}); p.mkdir(); (p / 'model_index.json').write_text('')"
        return [sys.executable, "-c", code]

    monkeypatch.setattr(recipe_runs, "command", pretend)
    finish(tmp_path, "dmd2", 0)
    train_recipe(tmp_path, "dmd2", 0)
    assert ran == []
    train_recipe(tmp_path, "dmd2+finish", 1)
    assert ran == ["warmup", "dmd2", "dmd2+finish"]
    assert cpu_seconds(tmp_path / "dmd2" / "seed1") > 0
    assert cpu_seconds(tmp_path / "dmd2" / "seed0") == 0


def test_finished_only_starts_no_run_and_scores_the_seeds_that_exist(
    tmp_path: Path,
    toy_networks: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    row = {
        "clip_score": 1.0,
        "caption_accuracy": 0.5,
        "attribute_accuracy": 0.6,
        "diversity": 0.1,
        "parameters": 7,
    }
    monkeypatch.setattr(
        toy_scores, "student_scores", lambda root, row_, seed, scorer: row | {"fid": float(seed)}
    )
    monkeypatch.setattr(recipe_runs, "command", lambda *_: pytest.fail("a run was started"))
    arguments = f"recipes --root {tmp_path} --seeds 1 2 --rows warmup dmd2 --finished-only".split()
    assert "recipes: none of these rows has finished" in refusal(main, arguments, capsys)
    for seed in (1, 2):
        finish(tmp_path, "warmup", seed)
    main([*arguments, "--out", str(tmp_path / "table.json")])
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert (
        list(rows) == ["warmup"]
        and rows["warmup"]["seeds"] == [1, 2]
        and rows["warmup"]["fid"]["mean"] == 1.5
    )
    assert "| warmup | 1.50 (1.00 to 2.00) | 1.0 | 50.0 |" in capsys.readouterr().out


def test_the_cost_of_an_interrupted_run_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "print('oh'); sum(range(10**7)); raise SystemExit(143)"
    monkeypatch.setattr(recipe_runs, "command", lambda root, row, seed: [sys.executable, "-c", code])
    costs = []
    for _ in range(2):
        with pytest.raises(RunStopped, match=r"warmup with seed 0 ended with exit code 143; see .*log.txt"):
            train_recipe(tmp_path, "warmup", 0)
        costs.append(cpu_seconds(run_folder(tmp_path, "warmup", 0)))
    assert costs[1] > 1.5 * costs[0] > 0
    assert (run_folder(tmp_path, "warmup", 0) / "log.txt").read_text() == "oh\noh\n"


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
    (tmp_path / "seed3").mkdir()
    write_lora(tmp_path / "seed3", live_adapters(unet.state_dict(), None))
    arguments = [
        "lora",
        "--student",
        str(base),
        "--lora",
        f"mine={tmp_path}/seed{{seed}}",
        "--seeds",
        "3",
        "--diversity_prompts",
        "1",
        "--samples",
        "4",
    ]
    main([*arguments, "--scales", "0", "1", "--out", str(out)])
    # Of the libraries' own lines none: bars of loading, modules to keep in float32, text encoders without LoRA.
    assert [line.split(":")[0] for line in capfd.readouterr().err.splitlines()] == [
        "plain",
        "mine, scale 0, seed 3",
        "mine, seed 3",
    ]
    first = json.loads(out.read_text())
    assert list(first["rows"]) == ["plain", "mine, scale 0", "mine"]
    plain, zero, styled = (first["rows"][row] for row in first["rows"])
    assert [plain[key]["mean"] for key in toy_lora.SCORES] == [zero[key]["mean"] for key in toy_lora.SCORES]
    assert plain["diversity"]["mean"] != styled["diversity"]["mean"]
    first["runs"]["mine, seed 3"]["diversity"] = 77.0
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
    for name in ("toy_finish_versus_none", "toy_segmented_versus_dmd2"):
        stored = json.loads((RESULTS / f"{name}.json").read_text())
        found = mean_differences(rows, [tuple(pair.split(":")) for pair in stored.pop("pairs")])
        for score, numbers in stored.items():
            assert found[score] == pytest.approx(numbers, rel=1e-9), (name, score)


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
    "c": row([0, 1], [None, 1.0]),
}


def test_paired_differences_match_seeds_and_leave_out_what_a_row_lacks() -> None:
    assert sorted(seed_differences(ROWS, [("a", "b")], "fid")) == [2.0, 5.0]
    assert sorted(seed_differences(ROWS, [("a", "b"), ("a", "c")], "fid")) == [2.0, 4.0, 5.0]
    assert seed_differences(ROWS, [("a", "c")], "fid") == [4.0]
    found = mean_differences(ROWS, [("a", "b"), ("a", "c")])["caption_accuracy"]
    assert found["mean"] == pytest.approx(11 / 3) and found["differences"] == 3
    assert found["standard_error"] == pytest.approx(((25 + 1 + 16) / 9 / 2 / 3) ** 0.5)


def test_paired_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "table.json"
    table.write_text(json.dumps({"rows": ROWS}))
    main(["paired", str(table), "--pairs", "a:b", "--out", str(tmp_path / "paired.json")])
    written = json.loads((tmp_path / "paired.json").read_text())
    assert written["pairs"] == ["a:b"] and written["fid"]["mean"] == 3.5
    assert "| FID | +3.5000 |" in capsys.readouterr().out
    for pair, message in (
        ("a:nobody", "there are no values of 'nobody' by seed; there are a, b, c"),
        ("a:c", "shape_score: a standard error needs at least two differences, got 1"),
        ("a", "--pairs takes ROW:ROW, got 'a'"),
    ):
        assert f"tables paired: {message}" in refusal(main, ["paired", str(table), "--pairs", pair], capsys)


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
    assert "has none of pairs, fid_ratio" in refusal(main, ["show", out], capsys)
    Path(out).write_text("[]")
    assert "out.json is not a score file" in refusal(main, ["show", out], capsys)


@pytest.fixture(scope="module")
def student_of_two_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base, folder = str(ROOT / "data" / "toy" / "base"), tmp_path_factory.mktemp("student") / "pipeline"
    family = StableDiffusion(base)
    export_pipeline(family.load_unet(), family, folder, dtype=torch.float32, timesteps=[999, 499])
    return folder


def test_image_to_image_is_scored_by_strength_and_kept(student_of_two_steps: Path, tmp_path: Path) -> None:
    out = tmp_path / "i2i.json"
    arguments = [
        "image_to_image",
        "--student",
        str(student_of_two_steps),
        "--samples",
        "4",
        "--out",
        str(out),
    ]
    main([*arguments, "--strengths", "0.5", "1", "--sheet", str(tmp_path / "sheet.png")])
    first = json.loads(out.read_text())
    assert list(first["rows"]) == [
        "input",
        "strength 0.5",
        "strength 1",
        "no input, 2 steps",
        "no input, 1 step",
    ]
    given, half, full = (row["estimates"] for row in list(first["rows"].values())[:3])
    # The inputs have their own captions' attributes, and the prompts are other captions'.
    assert given["input_agreement"]["value"] == 1.0 > given["prompt_agreement"]["value"]
    assert half["input_agreement"]["value"] > full["input_agreement"]["value"]
    assert Image.open(tmp_path / "sheet.png").size[1] > 5 * 32
    first["rows"]["strength 0.5"]["estimates"]["caption_accuracy"]["value"] = 77.0
    out.write_text(json.dumps(first))
    main([*arguments, "--strengths", "0.5", "1"])
    assert (
        json.loads(out.read_text())["rows"]["strength 0.5"]["estimates"]["caption_accuracy"]["value"] == 77.0
    )


def test_prompts_of_image_to_image_are_of_other_images() -> None:
    assert other_prompts(["a", "b", "c", "d", "e"]) == ["c", "d", "e", "a", "b"]


def test_a_strength_of_nothing_is_refused_before_anything_is_measured(
    student_of_two_steps: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "i2i.json"
    with pytest.raises(SystemExit) as ended:
        main(
            [
                "image_to_image",
                "--student",
                str(student_of_two_steps),
                "--strengths",
                "1",
                "0",
                "--out",
                str(out),
            ]
        )
    assert ended.value.code == 2 and "strength" in capsys.readouterr().err and not out.exists()
