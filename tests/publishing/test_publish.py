"""`python -m sdxs_lightning.publish`: the folder, the card's header, numbers and code, and the upload."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from unittest.mock import create_autospec

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import HfApi, ModelCard, ModelCardData
from PIL import Image

from sdxs_lightning.callbacks.run_folder import origin
from sdxs_lightning.publish import main
from sdxs_lightning.publishing.runs import Kind
from tests.helpers.tiny import save_tiny_sd, save_tiny_sdxl
from tests.helpers.tiny_run import ROOT
from tests.publishing.finished_run import PROMPTS, finished_run, write_scores

LICENCE = ("--licence", "creativeml-openrail-m")
SHORT = (*LICENCE, "--prompts", *PROMPTS)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of each kind, and a published student."""
    folder = tmp_path_factory.mktemp("publish")
    base = save_tiny_sd(folder / "base" / "sd-epsilon")
    student = finished_run(folder / "student", "pipeline", base) / "pipeline"
    kinds: tuple[Kind, ...] = ("lora", "controlnet", "decoder")
    for kind in kinds:
        finished_run(folder / kind, kind, base, student)
        if kind != "decoder":
            finished_run(folder / f"base-{kind}", kind, base)
    main([str(folder / "student"), "--out", str(folder / "hub"), *SHORT])
    return folder


@pytest.fixture
def mine(world: Path, tmp_path: Path) -> Path:
    """A copy of the student's run and of its published folder."""
    shutil.copytree(world / "student", tmp_path / "student")
    shutil.copytree(world / "hub", tmp_path / "hub")
    return tmp_path


def header_of(folder: Path) -> ModelCardData:
    """The card's header, as the hub's library reads it."""
    data = ModelCard.load(folder / "README.md").data
    assert isinstance(data, ModelCardData)
    return data


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The sentence with which it ends."""
    with pytest.raises(SystemExit) as end:
        main(arguments)
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1, said
    return said


def run_of_card(text: str, names: dict[str, Path]) -> Image.Image:
    """Executes the card's Python code, with folders instead of hub ids."""
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    for name, folder in names.items():
        assert f'"{name}"' in code
        code = code.replace(f'"{name}"', f'"{folder}"')
    scope: dict[str, Image.Image] = {}
    exec(code, scope)
    return scope["image"]


def test_a_runs_origin_is_this_repositorys_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    found = origin()
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    assert (
        found["commit"] == subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    )
    assert (
        isinstance(found["changed"], bool)
        and found["versions"]["torch"] == torch.__version__.partition("+")[0]
    )
    monkeypatch.setenv("PATH", "")  # no git
    assert origin() | {"versions": {}} == {"commit": None, "changed": None, "versions": {}}


# ------------------------------------------------------------------------------------------------------------- the folder


def test_the_header_is_the_hubs_and_has_the_runs_numbers(world: Path) -> None:
    data = header_of(world / "hub")
    assert (data.license, data.library_name, data.pipeline_tag) == (
        "creativeml-openrail-m",
        "diffusers",
        "text-to-image",
    )
    scores = json.loads((world / "student" / "scores.json").read_text())["metrics"]
    assert data.eval_results is not None
    assert {result.metric_type: result.metric_value for result in data.eval_results} == {
        name: one["value"] for name, one in scores.items()
    }
    for result in data.eval_results:
        one = scores[result.metric_type]
        args = {key: one[key] for key in ("hash", "samples", "low", "high")}
        assert result.metric_args == args | {"steps": 1, "guidance_scale": 1.0}


def test_the_text_says_how_to_call_it_and_what_it_is_from(world: Path) -> None:
    text = (world / "hub" / "README.md").read_text()
    for said in (
        "| FID | 31.25 | 29.5 to 33 | 40 | 1 | none |  | clean | `",
        "A negative prompt does nothing",
        "guidance_scale=0",
        "Steps: 1.",
        "Size: 32x32 px",
        "attachment A",
        "enforceable terms",
        str(world / "base" / "sd-epsilon"),
        "datasets/things (ShardDataModule)",
    ):
        assert said in text, said
    origin = json.loads((world / "student" / "origin.json").read_text())
    assert f"commit `{origin['commit']}`" in text and f"torch {origin['versions']['torch']}" in text
    names = {
        path.relative_to(world / "hub").as_posix() for path in (world / "hub").rglob("*") if path.is_file()
    }
    assert {"config.yaml", "origin.json", "scores/scores.json", "samples/0.png", "samples/1.png"} <= names


def test_the_students_code_gives_the_stored_image_bit_by_bit(world: Path) -> None:
    image = run_of_card((world / "hub" / "README.md").read_text(), {"your-name/student": world / "hub"})
    assert np.array_equal(np.asarray(image), np.asarray(Image.open(world / "hub" / "samples" / "0.png")))


@pytest.mark.parametrize("kind", ["lora", "controlnet", "decoder"])
def test_the_code_of_what_is_used_with_a_pipeline(
    world: Path, kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "hub"
    partner = "--base_model" if kind == "decoder" else "--student"
    sampler = ["--steps", "4", "--guidance_scale", "3"] if kind == "decoder" else []
    main([str(world / kind), "--out", str(out), partner, "me/partner", *sampler, *SHORT])
    text = (out / "README.md").read_text()
    here = world / "base" / "sd-epsilon" if kind == "decoder" else world / "student" / "pipeline"
    monkeypatch.chdir(out)  # for the condition image
    image = run_of_card(text, {"me/partner": here, f"your-name/{kind}": out})
    stored = np.asarray(Image.open(out / "samples" / "0.png"))
    assert np.array_equal(np.asarray(image), stored)
    card = ModelCard(text).data
    assert card.to_dict()["base_model"] == "me/partner"
    assert card.to_dict()["base_model_relation"] == ("finetune" if kind == "decoder" else "adapter")
    if kind != "decoder":  # it does something
        plain = np.asarray(Image.open(world / "hub" / "samples" / "0.png"))
        assert not np.array_equal(plain, stored)
    if kind == "lora":
        assert (out / "kohya" / "lora.safetensors").is_file()
        assert "`styles/ink.safetensors`, scale 1, in the real score only" in text


@pytest.mark.parametrize("kind", ["lora", "controlnet"])
def test_what_was_made_for_a_base_is_called_with_the_base(
    world: Path,
    kind: Kind,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, run = tmp_path / "hub", world / f"base-{kind}"
    arguments = [str(run), "--out", str(out), "--base_model", "org/base", *SHORT]
    said = refusal(arguments, capsys)
    assert (
        "was measured with 4 step(s) and guidance 3, and the card's code has 25 and 7.5; give these as"
        in said
    )
    main([*arguments, "--steps", "4", "--guidance_scale", "3"])
    text = (out / "README.md").read_text()
    monkeypatch.chdir(out)
    names = {"org/base": world / "base" / "sd-epsilon", f"your-name/base-{kind}": out}
    assert np.array_equal(
        np.asarray(run_of_card(text, names)), np.asarray(Image.open(out / "samples" / "0.png"))
    )
    assert 'from_pretrained("org/base", torch_dtype=torch.float32' in text
    assert "num_inference_steps=4, guidance_scale=3" in text and "| 40 | 4 | 3 | 0." in text
    assert "one-step" not in text and "negative prompt" not in text and "base in its many steps" in text
    header = header_of(out)
    assert header.base_model == "org/base" and header.tags is not None and "sdxs" not in header.tags
    main([str(run), "--out", str(out)])  # the second call reads steps and guidance from the folder
    assert "checked: " in capsys.readouterr().out


def test_an_explicit_partner(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run whose student is gone, or has moved."""
    shutil.copytree(world / "lora", tmp_path / "lora")
    config = tmp_path / "lora" / "config.yaml"
    config.write_text(config.read_text().replace(str(world / "student" / "pipeline"), "gone/pipeline"))
    arguments = [str(tmp_path / "lora"), "--out", str(tmp_path / "hub"), *SHORT]
    assert (
        "the run names 'gone/pipeline', which is no pipeline folder here; give one as --partner"
        in refusal(arguments, capsys)
    )
    said = refusal([*arguments, "--partner", str(world / "base" / "sd-epsilon")], capsys)
    assert "DDIMScheduler" in said or "student" in said
    narrow = finished_run(tmp_path / "narrow", "pipeline", save_tiny_sdxl(tmp_path / "sdxl-epsilon"))
    (tmp_path / "lora" / "scores.json").unlink()
    assert "it was trained for another base" in refusal(
        [*arguments, "--partner", str(narrow / "pipeline")], capsys
    )
    main([*arguments, "--partner", str(world / "student" / "pipeline")])
    text = (tmp_path / "hub" / "README.md").read_text()
    assert f'from_pretrained("{world / "student" / "pipeline"}")' in text
    assert "base_model" not in text.partition("---\n#")[0]  # a folder here is no hub id


def test_names_and_prompts_are_quoted(world: Path, tmp_path: Path) -> None:
    """They come from the command line and go into code that is executed."""
    prompt = 'a "red" circle\n```\n| 0123456789ab |\n'
    where = tmp_path / 'q"uote\\'
    main(
        [str(world / "lora"), "--out", str(where / "hub"), *LICENCE, "--prompts", prompt, "--student", 'a"b']
    )
    text = (where / "hub" / "README.md").read_text()
    assert 'from_pretrained("a\\"b")' in text and 'pipeline("a \\"red\\" circle\\n```' in text
    assert '| ![](samples/0.png) | a "red" circle ``` \\| 0123456789ab \\| |' in text


def test_a_header_of_the_base_that_cannot_be_parsed(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = mine / "student" / "config.yaml"
    (mine / "base").mkdir()
    found = re.search(r"base: (\S+)", config.read_text())
    assert found is not None
    config.write_text(config.read_text().replace(found[1], str(mine / "base")))
    (mine / "base" / "README.md").write_text("---\nlicense: [\n---\n")
    assert "the licence of the base" in refusal([str(mine / "student"), "--out", str(mine / "new")], capsys)
    (mine / "base" / "README.md").write_text("---\r\nlicense: mit\r\n---\r\n")
    main([str(mine / "student"), "--out", str(mine / "new"), "--prompts", PROMPTS[0]])
    assert header_of(mine / "new").license == "mit"


def test_sdxl(tmp_path: Path) -> None:
    base = save_tiny_sdxl(tmp_path / "sdxl-epsilon")
    run = finished_run(tmp_path / "run", "pipeline", base)
    main([str(run), "--out", str(tmp_path / "hub"), *SHORT])
    text = (tmp_path / "hub" / "README.md").read_text()
    assert "StableDiffusionXLPipeline" in text
    image = run_of_card(text, {"your-name/run": tmp_path / "hub"})
    assert np.array_equal(np.asarray(image), np.asarray(Image.open(tmp_path / "hub" / "samples" / "0.png")))


def test_a_run_without_scores_says_so(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (mine / "student" / "scores.json").unlink()
    main([str(mine / "student"), "--out", str(mine / "new"), *SHORT])
    assert "Nothing was measured." in (mine / "new" / "README.md").read_text()
    assert "0 numbers; measure with python -m evaluation.evaluate" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------- altered numbers


def in_scores(**changes: object) -> Callable[[Path], None]:
    def alter(folder: Path) -> None:
        path = folder / "student" / "scores.json"
        content = json.loads(path.read_text())
        for key, value in changes.items():
            if key.startswith("fid_"):
                content["metrics"]["fid"][key.removeprefix("fid_")] = value
            else:
                content[key] = value
        path.write_text(json.dumps(content))

    return alter


def in_card(before: str, after: str) -> Callable[[Path], None]:
    def alter(folder: Path) -> None:
        path = folder / "hub" / "README.md"
        assert before in path.read_text()
        path.write_text(path.read_text().replace(before, after))

    return alter


def in_file(name: str) -> Callable[[Path], None]:
    def alter(folder: Path) -> None:
        with (folder / "hub" / name).open("ab") as file:
            file.write(b" ")

    return alter


def put(path: Path, text: str) -> None:
    path.write_text(text)


def other_line_ends(folder: Path) -> None:
    path = folder / "hub" / "README.md"
    text = path.read_text().replace("| FID | 31.25 |", "| FID | 21.25 |")
    path.write_bytes(text.replace("\n", "\r\n").encode())


def other_weights(folder: Path) -> None:
    path = next((folder / "hub").glob("unet/*.safetensors"))
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\1")


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (in_scores(fid=30.0), "two values of fid, 30.0 and 31.25"),
        (in_scores(fid=20.0, fid_value=20.0), "outside its interval 29.5 to 33"),
        (in_scores(fid_settings={"network": "other"}), "do not have its hash"),
        (in_scores(model_sha256="0123456789abcdef"), "scores of a pipeline with hash 0123456789abcdef"),
        (in_scores(metrics={"fid": {"value": 1}}), "lacks a value, samples, hash or settings"),
        (
            in_card("| FID | 31.25 |", "| FID | 21.25 |"),
            "a row that the run's scores do not have: | FID | 21.25",
        ),
        (in_card("| 29.5 to 33 |", "| 31.2 to 31.3 |"), "a row that the run's scores do not have"),
        (in_card("value: 31.25", "value: 21.25"), "gives fid 21.25 with"),
        (in_card("samples: 40", "samples: 4000"), "gives fid 31.25 with"),
        (in_card("high: 33.0", "high: 31.3"), "gives fid 31.25 with"),
        (in_card("type: clean", "type: coco2014-30k-256"), "gives fid 31.25 with"),
        (in_card("| FID | 31.25 | 29.5 to 33 | 40", "| FID | 31.25 | 29.5 to 33 | 4000"), "a row that"),
        (in_card("| clean | `", "| coco2014 | `"), "a row that the run's scores do not have"),
        (in_card("` |\n| CLIP", "` | \n| FID | 2 | | | | | | |  \n| CLIP"), "a row that"),
        (in_card("## Licence", "| FID | 3 | 2 to 4 | b2c1b46eb900 |\n\n## Licence"), "a row that"),
        (in_card("## Made from", "### More\n\n| FID | 2 |\n\n## Made from"), "a row that the run's scores"),
        (in_card("## Measured", "## Numbers"), "has no section '## Measured'"),
        (other_line_ends, "a row that the run's scores do not have: | FID | 21.25"),
        (in_scores(nfe=4), "fid was measured with 4 step(s) and guidance 1, and the card's code has 1 and 0"),
        (in_scores(guidance_scale=4.5), "was measured with 1 step(s) and guidance 4.5"),
        (in_scores(lora_sha256="a" * 16), "scores of the pipeline together with a lora"),
        (
            in_scores(timesteps=[600]),
            "was measured with timesteps [600], and the card's code has the pipeline's own",
        ),
        (in_file("scores/scores.json"), "scores.json' is not what was written there"),
        (in_file("config.yaml"), "config.yaml' is not what was written there"),
        (in_file("samples/0.png"), "0.png' is not what was written there"),
        (in_file("scores/other.json"), "other.json' is not what was written there"),
        (in_scores(seconds=1.0), "scores/scores.json' is not what is in the run"),
        (in_scores(fid=None, fid_value=float("nan")), "value of fid is nan, and not a finite number"),
        (in_scores(fid_low="a"), "low of fid is 'a', and not a finite number"),
        (in_scores(guidance_scale=float("nan")), "guidance_scale of fid is nan, and not a finite number"),
        (in_scores(fid_samples=30000), "fid says 30000 images, and its settings 40"),
        (in_card("guidance_scale=0,", "guidance_scale=7.5,"), "has other code than made the samples"),
        (in_card("license: creativeml-openrail-m", "license: mit"), "has the license mit, and what was made"),
        (lambda mine: (mine / "hub" / "README.md").unlink(), "README.md' is missing"),
        (lambda mine: put(mine / "hub" / "publish.json", "[]"), "must hold a JSON object, got a list"),
        (lambda mine: put(mine / "hub" / "publish.json", "{}"), "is of another version of this command"),
        (in_card("license:", "license: ["), "the header of README.md cannot be parsed"),
        (other_weights, ".safetensors' is not what was written there"),
    ],
)
def test_what_was_altered_is_refused(
    mine: Path, alter: Callable[[Path], None], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    alter(mine)
    assert message in refusal([str(mine / "student"), "--out", str(mine / "hub")], capsys)


def test_a_folder_can_be_edited_and_is_checked_again(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    in_card("## Samples", "More words of mine.\n\n| a | b |\n|---|---|\n\n## Samples")(mine)
    (mine / "hub" / "LICENSE").write_text("terms")
    (mine / "student" / "report.json").write_text("{}")
    main([str(mine / "student"), "--out", str(mine / "hub")])
    said = capsys.readouterr().out
    assert "checked: " in said and "not read as scores, without metrics and hashes: report.json" in said
    assert "More words of mine." in (mine / "hub" / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{new}", "--out", "{out}"], "is no run (config.yaml is missing)"),
        (["{student}", "--out", "{student}"], "exists and is not a folder of this command"),
        (["{student}", "--out", "{out}"], "the licence of the base"),
        (["{student}", "--out", "{hub}", "--repo_id", "me"], "--repo_id is 'me'; it has the form org/name"),
        (["{student}", "--out", "{hub}", "--repo_id", "me/a--b"], "--repo_id is 'me/a--b': "),
        (
            ["{student}", "--out", "{out}", "--steps", "4"],
            "--steps and --guidance_scale are of what a base uses",
        ),
        (["{student}", "--out", "{out}", "--scale", "4"], "--scale is of LoRAs and ControlNets"),
        (["{student}", "--out", "{hub}", "--repo_id", "me/other"], "the card's code calls your-name/student"),
        (["{unfinished}", "--out", "{out}"], "so the run is not finished"),
        (["{student}", "--out", "{student}/pipeline/hub"], "is inside of"),
        (["{student}", "--out", "{hub}", "--base_model", "a folder"], "give the base's hub id (org/name)"),
        (
            ["{student}", "--out", "{out}", "--student", "a/b"],
            "--student is of LoRAs and ControlNets of a student",
        ),
        (["{student}", "--out", "{out}", "--partner", "{hub}"], "--partner is of LoRAs, ControlNets and"),
        (
            ["{student}", "--out", "{out}", "--condition", "{hub}"],
            "--condition is of ControlNets, and this run",
        ),
        (
            ["{student}", "--out", "{out}", "--licence", "no: ["],
            "--licence is 'no: ['; give --licence in the",
        ),
        (["{student}", "--out", "{hub}", "--steps", "4"], "--steps is 4, and the card's code in"),
    ],
)
def test_refusals(mine: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    (mine / "new").mkdir()
    shutil.copytree(mine / "student", mine / "unfinished", ignore=shutil.ignore_patterns("pipeline"))
    places = {name: mine / name for name in ("new", "out", "student", "hub", "unfinished")}
    assert message in refusal([one.format(**places) for one in arguments], capsys)
    assert not (mine / "out").exists()


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("model", "x", "model is 'x'"),
        ("model.init_args", None, "model.init_args.family is None"),
        ("model.init_args.family.init_args", {}, "model.init_args.family.init_args.base is None"),
        (
            "model.init_args.family.class_path",
            "a.B;open('x', 'w')",
            "the family is \"B;open('x', 'w')\", and cards",
        ),
        ("model.init_args.student", "x", "model.init_args.student.init_args is 'x'"),
        ("model.init_args.style", "x", "model.init_args.style is 'x'"),
        ("data", None, "data is None"),
        ("data.init_args", [1], "data.init_args is [1]"),
    ],
)
def test_what_is_no_configuration_of_a_stage(
    mine: Path, entry: str, value: object, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = mine / "student" / "config.yaml"
    config = yaml.safe_load(path.read_text())
    *names, last = entry.split(".")
    inner = config
    for name in names:
        inner = inner[name]
    inner[last] = value
    path.write_text(yaml.safe_dump(config))
    assert message in refusal([str(mine / "student"), "--out", str(mine / "out"), *SHORT], capsys)


def test_an_export_of_another_run_in_the_folder(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    student = mine / "student"
    arguments = [str(student), "--out", str(mine / "hub")]
    (student / "starts.jsonl").write_text('{"started": "2020-01-01T00:00:00+00:00", "resumed_from": null}\n')
    main(arguments)
    with (student / "starts.jsonl").open("a") as file:
        file.write('{"started": "2999-01-01T00:00:00+00:00", "resumed_from": "a"}\n')
    main(arguments)
    with (student / "starts.jsonl").open("a") as file:
        file.write('{"started": "2999-01-01T00:00:00+00:00", "resumed_from": null}\n')
    assert "began anew on 2999-01-01 00:00 UTC and has not exported since" in refusal(arguments, capsys)
    (student / "starts.jsonl").unlink()
    (student / "lora").mkdir()
    assert "has pipeline/ and lora/, and a run makes one of them" in refusal(arguments, capsys)


def test_what_a_table_cannot_hold_is_escaped(mine: Path) -> None:
    """Names of protocols and metrics without interval, whose entries the header leaves out."""
    in_scores(protocol={"name": "mine|b\nc"}, fid_low=None, fid_high=None)(mine)
    main([str(mine / "student"), "--out", str(mine / "new"), *SHORT])
    text = (mine / "new" / "README.md").read_text()
    assert "| FID | 31.25 | none | 40 | 1 | none |  | mine\\|b c | `" in text
    assert header_of(mine / "new").eval_results[0].metric_args.keys() == {  # type: ignore[index, union-attr]
        "hash",
        "samples",
        "steps",
        "guidance_scale",
    }


def test_a_deep_condition_image_keeps_its_range(world: Path, tmp_path: Path) -> None:
    depth = np.linspace(0, 65535, 32 * 32, dtype=np.uint16).reshape(32, 32)
    Image.fromarray(depth).save(tmp_path / "depth.png")
    arguments = [str(world / "controlnet"), "--out", str(tmp_path / "hub"), *LICENCE, "--prompts", PROMPTS[0]]
    main([*arguments, "--condition", str(tmp_path / "depth.png")])
    found = np.asarray(Image.open(tmp_path / "hub" / "condition.png"))
    assert np.array_equal(found, np.repeat((depth >> 8).astype(np.uint8)[..., None], 3, axis=2))


def test_a_controlnet_is_called_as_it_was_trained(world: Path, tmp_path: Path) -> None:
    """At the scale of its training, and with a condition image whose shapes keep theirs."""
    square = Image.fromarray(np.arange(32 * 32 * 3, dtype=np.uint32).reshape(32, 32, 3).astype(np.uint8))
    wide = Image.new("RGB", (64, 32), "red")
    wide.paste(square, (16, 0))
    wide.save(tmp_path / "wide.png")
    for kind, holder, scale in (("controlnet", "student", 0.5), ("base-controlnet", "model", 1.5)):
        run = tmp_path / f"run-{kind}"
        shutil.copytree(world / kind, run)
        file = run / "config.yaml"
        config = yaml.safe_load(file.read_text())
        arguments = config["model"]["init_args"]
        owner = arguments["student"]["init_args"] if holder == "student" else arguments
        owner["controlnet"] = {"conditioning_scale": scale}
        file.write_text(yaml.safe_dump(config))
        out = tmp_path / kind
        sampler = [] if holder == "student" else ["--steps", "4", "--guidance_scale", "3"]
        line = [str(run), "--out", str(out), *SHORT, *sampler, "--condition", str(tmp_path / "wide.png")]
        main(line)
        assert f"controlnet_conditioning_scale={scale}," in (out / "README.md").read_text()
        assert np.array_equal(np.asarray(Image.open(out / "condition.png")), np.asarray(square))


def test_a_known_base_needs_no_licence(mine: Path) -> None:
    name = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    main([str(mine / "student"), "--out", str(mine / "new"), "--base_model", name, "--prompts", PROMPTS[0]])
    data = header_of(mine / "new")
    assert (data.license, data.base_model) == ("creativeml-openrail-m", name)


# --------------------------------------------------------------------------------------------------------------- upload


def test_upload_calls_the_hubs_own_interface(
    mine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(mine / "hub")
    api = create_autospec(HfApi, instance=True)  # refuses arguments that the real methods do not take
    api.upload_folder.return_value = "https://huggingface.co/me/student/commit/1"
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
    main([str(mine / "student"), "--out", str(mine / "hub"), "--repo_id", "me/student", "--private", *SHORT])
    api.create_repo.assert_called_once_with(
        repo_id="me/student", repo_type="model", private=True, exist_ok=True
    )
    (call,) = api.upload_folder.call_args_list
    assert (call.kwargs["repo_id"], call.kwargs["folder_path"]) == ("me/student", mine / "hub")
    assert "uploaded: https://huggingface.co/me/student/commit/1" in capsys.readouterr().out
    assert '"me/student"' in (mine / "hub" / "README.md").read_text()


def test_without_network_the_folder_stays_and_the_message_says_how(
    mine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_TOKEN", "none")
    said = refusal(
        [str(mine / "student"), "--out", str(mine / "new"), "--repo_id", "me/student", *SHORT], capsys
    )
    assert "the hub did not take 'me/student'" in said and "The folder is complete" in said
    assert (mine / "new" / "README.md").is_file()


def test_scores_of_another_model_are_refused(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_scores(mine / "student", model_sha256="0" * 16)
    assert "measure the exported one again" in refusal(
        [str(mine / "student"), "--out", str(mine / "x"), *SHORT], capsys
    )


def test_scores_of_a_lora_are_of_its_student(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "lora"
    shutil.copytree(world / "lora", run)
    arguments = [str(run), "--out", str(tmp_path / "hub"), *LICENCE, "--prompts", PROMPTS[0]]
    main(arguments)
    text = (tmp_path / "hub" / "README.md").read_text()
    assert "| 40 | 1 | none | 0.75 | clean |" in text and "scale: 0.75" in text
    for changes, message in (
        (
            {"model_sha256": "0" * 16},
            "fid was measured with the pipeline 0000000000000000, and the card's code uses",
        ),
        ({"lora_scale": "unknown"}, "or the file what it was measured with"),
        ({"controlnet_sha256": "0" * 16}, "scores of the lora together with a controlnet"),
        ({"lora_scale": 0.5}, "scores/scores.json' is not what is in the run"),
    ):
        write_scores(run, **changes)
        assert message in refusal(arguments, capsys)
