"""Inputs that gave a wrong number without a word: the right number, or a refusal before anything is measured."""

from __future__ import annotations

import json
import os
import shutil
import warnings
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessor

from evaluation.evaluate import main
from evaluation.images.image_sets import open_images
from evaluation.images.prompt_files import PromptList, read_prompts
from evaluation.images.samples import ModelSamples
from evaluation.images.saved_images import SavedImages
from evaluation.metrics.frechet import FeatureStatistics, frechet_distance
from evaluation.networks.frozen_clip import FrozenClip
from evaluation.protocols.image_protocol import ImageProtocol, Measurement
from evaluation.protocols.protocols import IMAGE_PROTOCOLS, PROTOCOLS
from sdxs_lightning.core.errors import UserError
from sdxs_lightning.core.model_hash import hash_model
from tests.helpers.metric_networks import random_images, write_clip
from tests.helpers.refusals import refusal
from tests.helpers.tiny import save_tiny_sd, save_tiny_sdxl

WORDS = [
    f"a {colour} {shape}"
    for colour in ("red", "blue", "green", "pink")
    for shape in ("circle", "square", "ring")
]
COUNT = len(WORDS)
CPU = torch.device("cpu")

Run = Callable[..., dict[str, Any]]
Refused = Callable[..., str]


@pytest.fixture
def options(world: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A protocol of every number that the tests' CLIP can measure."""
    measurements = (
        Measurement("fid", "clip_image:vit-b-32"),
        Measurement("clip_score", "clip_text:vit-b-32"),
    )
    monkeypatch.setitem(IMAGE_PROTOCOLS, "any", ImageProtocol("any", measurements))
    for command in ("evaluate", "reference"):
        monkeypatch.setattr(f"evaluation.{command}.PROTOCOL_NAMES", (*PROTOCOLS, *IMAGE_PROTOCOLS))
    clip = world / "clip"
    return ["--protocol", "any", "--device", "cpu", "--processes", "1", "--batch_size", "5",
            "--weights", f"clip_image={clip}", f"clip_text={clip}", f"clip_unit={clip}"]  # fmt: skip


@pytest.fixture
def run(options: list[str], tmp_path: Path) -> Run:
    """The command in this process, always with the same --out; its result."""

    def run(*arguments: object, out: str = "out.json") -> dict[str, Any]:
        main([*map(str, arguments), *options, "--out", str(tmp_path / out)])
        result: dict[str, Any] = json.loads((tmp_path / out).read_text())
        return result

    return run


@pytest.fixture
def refused(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """What the command says when it refuses; nothing has been measured then."""

    def refused(*arguments: object) -> str:
        said = refusal(main, [*arguments, *options, "--out", tmp_path / "refused.json"], capsys)
        assert not list((tmp_path / "refused.work").glob("*/batch_*.npz"))
        return said

    return refused


def write_images(folder: Path, names: Sequence[str], seed: int = 0, size: int = 40) -> Path:
    for name, image in zip(names, random_images(len(names), seed, size), strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / name)
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images", [f"{i}.png" for i in range(COUNT)])


@pytest.fixture
def real(tmp_path: Path) -> Path:
    return write_images(tmp_path / "real", [f"{i:02d}.png" for i in range(20)], seed=1)


def captions(path: Path, lines: Sequence[str]) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def direct_clip_score(world: Path, folder: Path, names: Sequence[str], texts: Sequence[str]) -> float:
    clip = FrozenClip(world / "clip")
    frames = [np.asarray(Image.open(folder / name).convert("RGB")) for name in names]
    stacked = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)
    return float(100 * clip.cosine(stacked, texts).double().mean())


# What a kept number depends on.


def test_captions_in_another_order_are_measured_again(run: Run, images: Path, tmp_path: Path) -> None:
    scored = ["--images", images, "--metrics", "clip_score", "--captions"]
    first = run(*scored, captions(tmp_path / "a.txt", WORDS))
    second = run(*scored, captions(tmp_path / "a.txt", WORDS[::-1]))
    fresh = run(*scored, tmp_path / "a.txt", out="fresh.json")
    assert second["clip_score"] == fresh["clip_score"] != first["clip_score"]
    hashes = [result["metrics"]["clip_score"]["hash"] for result in (first, second, fresh)]
    assert hashes[0] != hashes[1] == hashes[2]


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("scheduler/scheduler_config.json", "prediction_type", "v_prediction"),
        ("vae/config.json", "scaling_factor", 7.5),
    ],
)
def test_a_configuration_of_the_model_counts(
    run: Run, real: Path, tmp_path: Path, file: str, key: str, value: object
) -> None:
    base, prompts = save_tiny_sd(tmp_path / "sd"), captions(tmp_path / "a.txt", WORDS)
    scored = ["--model", base, "--captions", prompts, "--reference", real, "--metrics", "fid", "--steps", 2]
    first = run(*scored)
    (base / "README.md").write_text("A card changes no image.")
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out.work").rglob("batch_*.npz")}
    again = run(*scored)
    assert (again["fid"], again["model_sha256"]) == (first["fid"], first["model_sha256"])
    assert kept == {path: path.stat().st_mtime_ns for path in (tmp_path / "out.work").rglob("batch_*.npz")}
    settings = json.loads((base / file).read_text())
    (base / file).write_text(json.dumps({**settings, key: value}))
    second, fresh = run(*scored), run(*scored, out="fresh.json")
    assert second["fid"] == fresh["fid"] != first["fid"]
    assert second["model_sha256"] == fresh["model_sha256"] != first["model_sha256"]


def test_metric_networks_that_were_replaced_are_measured_again(
    options: list[str], run: Run, images: Path, real: Path, tmp_path: Path, world: Path
) -> None:
    clip = shutil.copytree(world / "clip", tmp_path / "clip")
    options[-1] = f"clip_unit={clip}"
    scored = ["--images", images, "--reference", real, "--metrics", "cmmd"]
    first = run(*scored)
    settings = json.loads((clip / "open_clip_config.json").read_text())
    settings["model_cfg"]["vision_cfg"]["head_width"] = 32  # the same weights, cut into other heads
    (clip / "open_clip_config.json").write_text(json.dumps(settings))
    second = run(*scored)
    assert second["cmmd"] != first["cmmd"]
    assert second["metrics"]["cmmd"]["hash"] != first["metrics"]["cmmd"]["hash"]


def test_text_files_beside_the_images_change_no_fid(run: Run, images: Path, real: Path) -> None:
    scored = ["--images", images, "--reference", real]
    first = run(*scored, "--metrics", "fid")
    for number, words in enumerate(WORDS):
        (images / f"{number}.txt").write_text(words)
    second = run(*scored)
    assert second["metrics"]["fid"]["hash"] == first["metrics"]["fid"]["hash"]
    assert second["fid"] == first["fid"]
    assert second["metrics"]["clip_score"]["settings"]["captions"] is not None


def test_a_reference_with_other_images_of_the_same_sizes_has_another_hash(
    run: Run, images: Path, tmp_path: Path
) -> None:
    hashes = []
    for seed in (1, 2):
        folder = write_images(
            tmp_path / "bmp", [f"{i}.bmp" for i in range(20)], seed
        )  # files of one size in bytes
        result = run("--images", images, "--reference", folder, "--metrics", "fid")
        hashes.append((result["metrics"]["fid"]["hash"], result["fid"]))
    assert hashes[0][0] != hashes[1][0]
    assert hashes[0][1] != hashes[1][1]


def test_a_model_hash_is_over_what_is_loaded(tmp_path: Path) -> None:
    base = save_tiny_sd(tmp_path / "sd")
    first = hash_model(base)
    for name in ("README.md", "sample.png", "unet/diffusion_pytorch_model.bin", "safety_checker/config.json"):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text("{}")
    assert hash_model(base) == first
    merges = base / "tokenizer" / "tokenizer_config.json"
    settings = json.loads(merges.read_text())
    merges.write_text(json.dumps(settings | {"_name_or_path": "elsewhere"}))
    assert hash_model(base) == first
    merges.write_text(json.dumps(settings | {"model_max_length": 5}))
    assert hash_model(base) != first
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError):
        hash_model(tmp_path / "empty")


# Which caption belongs to which image.


def test_numbered_images_are_in_the_order_of_their_numbers(
    run: Run, images: Path, tmp_path: Path, world: Path
) -> None:
    assert open_images(str(images)).names == [f"{i}.png" for i in range(COUNT)]
    result = run(
        "--images", images, "--metrics", "clip_score", "--captions", captions(tmp_path / "a.txt", WORDS)
    )
    expected = direct_clip_score(world, images, [f"{i}.png" for i in range(COUNT)], WORDS)
    assert result["clip_score"] == pytest.approx(expected, rel=1e-5)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for path in images.iterdir():
            archive.write(path, path.name)
    zipped = open_images(str(tmp_path / "a.zip"))
    assert zipped.names == open_images(str(images)).names
    assert zipped.digest() == open_images(str(images)).digest()


def test_names_match_by_relative_path_first_and_never_by_chance() -> None:
    table = PromptList(("of x", "of y", "of z"), ("x/0.jpg", "y/0.jpg", "z.jpg"))
    assert table.of_images(["y/0.png", "x/0.png"], "f") == ["of y", "of x"]
    assert table.of_images(["deep/z.png"], "f") == ["of z"]
    with pytest.raises(UserError, match=r"'f' has 2 captions for 'w/0\.png' \(rows 1 and 2\)"):
        table.of_images(["w/0.png"], "f")
    with pytest.raises(UserError, match="several images are called 'z.jpg'"):
        table.of_images(["a/z.png", "b/z.png"], "f")
    with pytest.raises(
        UserError, match=r"none of the names in 'f' \(the first is 'x/0.jpg'\) is that of an image"
    ):
        table.of_images(["p.png", "q.png", "r.png"], "f")
    with pytest.raises(UserError, match="no caption for 1 of 2 images, the first of them 'q.png'"):
        table.of_images(["x/0.png", "q.png"], "f")
    twice = PromptList(("one", "two"), ("a.png", "a.png"))
    with pytest.raises(UserError, match="has 2 captions for 'a.png'"):
        twice.of_images(["a.png"], "f")
    dotted = PromptList(("one", "two"), ("v1.5", "v1.6"))
    assert dotted.of_images(["v1.6.png", "v1.5.png"], "f") == ["two", "one"]


def test_images_of_coco_match_by_id_or_by_count() -> None:
    names = tuple(f"COCO_val2014_{i:012d}.jpg" for i in (9, 25, 42))
    coco = PromptList(("nine", "twenty-five", "forty-two"), names, "coco")
    assert coco.of_images(["42.png", "000000000009.png"], "f") == ["forty-two", "nine"]
    assert coco.of_images(["0.png", "1.png", "2.png"], "f") == list(coco.captions)
    assert coco.of_images(["00.png", "01.png"], "f") == list(coco.selection(2, "f").captions)
    with pytest.raises(UserError, match="none of the names"):
        coco.of_images(["a.png", "b.png", "c.png"], "f")


def test_an_empty_line_between_captions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="without words .number 2."):
        read_prompts(captions(tmp_path / "a.txt", ["a", "", "b"]))
    assert read_prompts(captions(tmp_path / "b.txt", ["a\u2028b", "c", "", ""])).captions == ("a\u2028b", "c")
    (tmp_path / "c.csv").write_text("caption,style\na dog, sitting,x\n")
    with pytest.raises(UserError, match="row 2 has 3 cells, the header 2"):
        read_prompts(tmp_path / "c.csv")


def test_captions_beside_images_have_words_and_one_image_each(images: Path) -> None:
    for number, words in enumerate(WORDS):
        (images / f"{number}.txt").write_text(words)
    assert open_images(str(images)).captions() == WORDS
    (images / "3.txt").write_text(" \n")
    with pytest.raises(UserError, match="3.txt' has no words"):
        open_images(str(images)).captions()
    (images / "3.txt").write_text("x")
    shutil.copy(images / "3.png", images / "3.bmp")
    with pytest.raises(UserError, match="two images have the caption file"):
        open_images(str(images)).captions()


# The usual prompt sets, as they are published.


def test_the_usual_prompt_sets_are_read(tmp_path: Path) -> None:
    parti = tmp_path / "PartiPrompts.tsv"
    parti.write_text(
        'Prompt\tCategory\tChallenge\tNote\n"hello" in red ink\tWorld Knowledge\tBasic\t\n"a ""b"""\tArts\tBasic\tx\n'
    )
    found = read_prompts(parti)
    assert found.captions == ('"hello" in red ink', 'a "b"')
    assert found.categories == ("World Knowledge", "Arts")

    mjhq = tmp_path / "meta_data.json"
    mjhq.write_text(
        json.dumps(
            {
                "ab12": {"category": "animals", "prompt": "a cat"},
                "cd34": {"category": "art", "prompt": "a dog"},
            }
        )
    )
    found = read_prompts(mjhq)
    assert (found.captions, found.categories, found.names) == (
        ("a cat", "a dog"),
        ("animals", "art"),
        ("ab12", "cd34"),
    )
    assert found.of_images(["art/cd34.png", "animals/ab12.png"], "f") == ["a dog", "a cat"]

    geneval = tmp_path / "evaluation_metadata.jsonl"
    rows = [
        {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}
    ]
    geneval.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_prompts(geneval)
    assert (found.captions, found.categories) == (("a photo of a bench",), ("single_object",))
    assert found.records == tuple(rows)

    drawbench = tmp_path / "DrawBench.csv"
    drawbench.write_text('Prompts,Category\nA red car.,Colors\n"Two dogs, running.",Counting\n')
    assert read_prompts(drawbench).captions == ("A red car.", "Two dogs, running.")

    (tmp_path / "anime.json").write_text(json.dumps(["a girl", "a boy"]))
    (tmp_path / "benchmark.json").write_text(json.dumps({"anime": ["a girl"], "photo": ["a boy", "a hat"]}))
    (tmp_path / "test.json").write_text(
        json.dumps([{"prompt": "a girl", "image_path": ["0.jpg", "1.jpg"], "rank": [0, 1]}])
    )
    assert read_prompts(tmp_path / "anime.json").captions == ("a girl", "a boy")
    found = read_prompts(tmp_path / "benchmark.json")
    assert (found.captions, found.categories) == (("a girl", "a boy", "a hat"), ("anime", "photo", "photo"))
    assert read_prompts(tmp_path / "test.json").names is None


def test_categories_have_numbers_of_their_own(run: Run, images: Path, tmp_path: Path, world: Path) -> None:
    table = tmp_path / "a.csv"
    lines = [f"{i}.png,{words},{'odd' if i % 2 else 'even'}" for i, words in enumerate(WORDS)]
    table.write_text("\n".join(["file_name,caption,category", *lines]))
    entry = run("--images", images, "--metrics", "clip_score", "--captions", table)["metrics"]["clip_score"]
    odd = [number for number in range(COUNT) if number % 2]
    expected = direct_clip_score(world, images, [f"{i}.png" for i in odd], [WORDS[i] for i in odd])
    assert entry["categories"]["odd"]["value"] == pytest.approx(expected, rel=1e-5)
    assert {name: one["samples"] for name, one in entry["categories"].items()} == {"even": 6, "odd": 6}


# References.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigma": -np.eye(16)}, "negative eigenvalue -1"),
        ({"sigma": np.diag([1.0] * 15 + [-0.5])}, "negative eigenvalue -0.5"),
        ({"sigma": np.eye(16) + np.triu(np.ones((16, 16)), 1) * 0.1}, "not symmetric"),
        ({"n": -3}, "'n' is -3"),
        ({"n": 2.5}, "'n' is 2.5"),
        ({"n": 1}, "'n' is 1"),
        ({"protocol": "[1]"}, "JSON object"),
        ({"sigma": np.eye(16) * (1 + 1j)}, "not real numbers"),
        ({"mu": np.full(16, np.nan)}, "finite"),
        (
            {"mu": np.zeros(64), "sigma": np.eye(64)},
            "has fid features of 64 dimensions, the network of this protocol 16",
        ),
    ],
)
def test_statistics_that_are_none_are_refused_before_anything_is_measured(
    refused: Refused, images: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    content: dict[str, Any] = {"mu": np.zeros(16), "sigma": np.eye(16), "n": 100}
    np.savez(tmp_path / "bad.npz", **(content | change))
    assert message in refused("--images", images, "--reference", tmp_path / "bad.npz", "--metrics", "fid")


def test_rounding_is_no_reason_to_refuse(tmp_path: Path) -> None:
    features = torch.randn(10, 16).double()  # rank 9
    covariance = np.cov(features.T.numpy()).astype(np.float32).astype(np.float64)
    covariance[0, 1] += 1e-7
    np.savez(tmp_path / "a.npz", mu=features.mean(0).numpy(), sigma=covariance)
    assert FeatureStatistics.load(tmp_path / "a.npz").count == 0


def test_a_damaged_file_of_statistics_is_refused(refused: Refused, images: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", mu=np.zeros(16), sigma=np.eye(16))
    content = (tmp_path / "a.npz").read_bytes()
    for number, damaged in enumerate(
        (content[:200], content[: len(content) // 2], b"", content[:60] + b"\0" * 100 + content[160:])
    ):
        (tmp_path / "b.npz").write_bytes(damaged)
        said = refused("--images", images, "--reference", tmp_path / "b.npz", "--metrics", "fid")
        assert "holds no statistics" in said, number


def test_too_few_images_for_a_metric_are_refused_before_anything_is_measured(
    refused: Refused, images: Path, real: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measurements = (Measurement("kid", "clip_image:vit-b-32"),)
    monkeypatch.setitem(IMAGE_PROTOCOLS, "any", ImageProtocol("any", measurements))
    said = refused("--images", images, "--reference", real)
    assert f"kid needs at least 1000 images on each side, got {COUNT} and 20 of the reference" in said


# Pixels.


def test_sixteen_bits_are_scaled_and_alpha_is_dropped(tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 0x4000, np.uint16)).save(tmp_path / "deep.png")
    assert np.asarray(open_images(str(tmp_path)).read(0)).tolist() == [[[64] * 3] * 8] * 8
    (tmp_path / "deep.png").unlink()
    pixels = np.random.RandomState(0).randint(0, 256, (8, 8, 4), np.uint8)
    for mode, name in (("RGBA", "a.png"), ("LA", "b.png"), ("RGBA", "c.webp"), ("P", "d.png")):
        image = Image.fromarray(pixels).convert(mode)
        image.save(tmp_path / name, lossless=True) if name.endswith("webp") else image.save(tmp_path / name)
    found = open_images(str(tmp_path))
    for number, name in enumerate(
        found.names
    ):  # as Image.open(...).convert("RGB") of clean-fid and torch-fidelity
        with Image.open(tmp_path / name) as opened:
            assert np.array_equal(np.asarray(found.read(number)), np.asarray(opened.convert("RGB"))), name


def test_no_image_is_left_out_without_a_word(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    names = ["a.tif", "b.tiff", "c.gif", "d.jfif", "e.avif", "f.PNG"]
    write_images(folder, ["f.PNG"])
    for name in names[:-1]:
        with Image.open(folder / "f.PNG") as opened:
            opened.save(folder / name, format={".jfif": "JPEG"}.get(Path(name).suffix))
    found = open_images(str(folder))
    assert found.names == names
    assert found.formats == "avif+gif+jpg+png+tif"
    assert all(found.read(number).size == (40, 40) for number in range(len(names)))
    (folder / "g.heic").write_bytes(b"x")
    with pytest.raises(
        UserError, match="holds 1 images of formats that are not read, the first of them 'g.heic'"
    ):
        open_images(str(folder))
    (folder / "g.heic").unlink()
    os.symlink(tmp_path, folder / "link")
    with pytest.raises(UserError, match="link' is a link to another folder"):
        open_images(str(folder))
    (folder / "link").unlink()
    shutil.copy(folder / "f.PNG", folder / "unnamed")
    with pytest.raises(UserError, match="unnamed' is an image whose name has no ending"):
        open_images(str(folder))
    (folder / "unnamed").unlink()
    (folder / "LICENSE").write_text("words")
    (folder / "0.tar").write_bytes(b"")
    with pytest.raises(UserError, match="holds .tar shards and images beside them"):
        open_images(str(folder))
    (folder / "0.tar").unlink()
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(folder / "c.gif", save_all=True, append_images=frames[1:])
    with pytest.raises(UserError, match="c.gif: holds 2 images"):
        open_images(str(folder)).read(2)


def test_mixed_sizes_are_measured_and_said(
    run: Run, images: Path, tmp_path: Path, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # pytorch-fid 81, torch-fidelity 55: images of different sizes in one folder ended in a traceback; clean-fid 2: in two.
    real = write_images(tmp_path / "large", [f"{i:02d}.png" for i in range(20)], seed=1, size=70)
    with Image.open(images / "0.png") as opened:
        opened.resize((64, 48)).save(images / "0.png")
    result = run("--images", images, "--reference", real, "--metrics", "fid")
    clip = FrozenClip(world / "clip")
    sides: list[torch.Tensor] = []
    for folder in (images, real):  # by hand: one image after the other
        frames = [np.asarray(Image.open(path).convert("RGB")) for path in sorted(folder.glob("*.png"))]
        rows = [clip.image_features(torch.from_numpy(frame).permute(2, 0, 1)[None]) for frame in frames]
        features = torch.cat(rows).double()
        sides += [features.mean(0), features.T.cov()]
    expected = frechet_distance(*sides)
    assert result["metrics"]["fid"]["value"] == pytest.approx(expected, rel=1e-4)
    assert result["image_statistics"]["sizes"] == {"40 x 40": COUNT - 1, "64 x 48": 1}
    assert "The images have 2 sizes, most of them 40 x 40" in capsys.readouterr().out


# Models.


def with_safety_checker(folder: Path) -> Path:
    """A model folder whose safety checker returns black images, whatever it is shown."""
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**small, "vocab_size": 8},
        vision_config={**small, "image_size": 32, "patch_size": 16},
        projection_dim=16,
    )
    checker = StableDiffusionSafetyChecker(config)
    with torch.no_grad():
        checker.concept_embeds_weights.fill_(-2.0)
        checker.special_care_embeds_weights.fill_(-2.0)
    checker.save_pretrained(folder / "safety_checker")
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor.save_pretrained(folder / "feature_extractor")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "requires_safety_checker": True,
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    pipeline = DiffusionPipeline.from_pretrained(folder)  # as it is loaded without our options
    assert np.asarray(pipeline("a red circle", num_inference_steps=1).images[0]).max() == 0
    return folder


def test_a_safety_checker_is_off_and_said(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, prompts = save_tiny_sd(tmp_path / "sd"), captions(tmp_path / "a.txt", WORDS[:6])
    scored = ["--captions", prompts, "--metrics", "clip_score", "--samples", 6, "--model"]
    expected = run(*scored, plain)
    checked = with_safety_checker(shutil.copytree(plain, tmp_path / "checked"))
    assert (checked / "safety_checker" / "config.json").is_file()
    found = run(*scored, checked, out="checked.json")
    assert found["clip_score"] == expected["clip_score"]
    assert found["model_sha256"] == expected["model_sha256"]
    assert found["image_statistics"]["constant_images"] == 0
    assert found["notes"] == ["Off for the measurement: the safety checker of the model folder."]
    assert "notes" not in expected
    assert ModelSamples(str(save_tiny_sdxl(tmp_path / "xl")), ("a",)).switched_off() == ["SDXL's watermark"]


def test_black_images_are_counted(
    run: Run, images: Path, real: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (40, 40)).save(images / "1.png")
    Image.new("RGB", (40, 40), (9, 8, 7)).save(images / "2.png")
    result = run("--images", images, "--reference", real, "--metrics", "fid")
    assert result["image_statistics"]["constant_images"] == 2
    assert f"2 of {COUNT} images are of one colour" in capsys.readouterr().out


def test_saved_images_are_read_back_and_not_made_again(
    run: Run,
    real: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    base, prompts = save_tiny_sd(tmp_path / "sd"), captions(tmp_path / "a.txt", WORDS)
    saved = tmp_path / "saved"
    scored = ["--model", base, "--captions", prompts, "--reference", real, "--metrics", "fid", "clip_score"]
    first = run(*scored, "--save_images", saved)
    assert sorted(path.name for path in saved.glob("*.png")) == [f"{i:06d}.png" for i in range(COUNT)]
    stored = run(
        "--images", saved, "--reference", real, out="stored.json"
    )  # with the captions beside the images
    for name in ("fid", "clip_score"):
        assert stored[name] == first[name]
    (saved / "000007.png").unlink()
    shutil.rmtree(tmp_path / "out.work")
    made: list[int] = []
    original = ModelSamples.open

    def counting(self: ModelSamples, device: torch.device) -> Any:
        make = original(self, device)

        def counted(numbers: Sequence[int]) -> list[Image.Image]:
            made.extend(numbers)
            return make(numbers)

        return counted

    monkeypatch.setattr(ModelSamples, "open", counting)
    again = run(*scored, "--save_images", saved)
    assert made == [5, 6, 7, 8, 9]  # the batch of the missing image alone
    assert again["fid"] == pytest.approx(first["fid"], rel=1e-9)
    said = refusal(main, [*scored, "--steps", 2, "--save_images", saved, *options], capsys)
    assert "holds images that were made otherwise (nfe)" in said
    said = refusal(main, [*scored, "--save_images", real, *options], capsys)
    assert "holds other files" in said


def test_layouts_that_other_benchmarks_read(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 8), "red")
    record = {"tag": "single_object", "include": [], "prompt": "a/b"}
    geneval = SavedImages(str(tmp_path / "g"), ("a/b",), None, (record,), "geneval")
    compbench = SavedImages(str(tmp_path / "t"), ("a/b",), layout="t2i_compbench")
    named = SavedImages(str(tmp_path / "f"), ("a/b",), names=("stanford_0",))
    for one in (geneval, compbench, named):
        one.begin({"model": "x"})
        one.write(0, image)
        assert one.has([0])
        assert one.read([0])[0].getpixel((0, 0)) == (255, 0, 0)
    assert json.loads((tmp_path / "g" / "00000" / "metadata.jsonl").read_text()) == record
    assert (tmp_path / "g" / "00000" / "samples" / "00000.png").is_file()
    assert (tmp_path / "t" / "samples" / "a b_000000.png").is_file()
    assert (tmp_path / "f" / "stanford_0.txt").read_text() == "a/b\n"
    with pytest.raises(UserError, match="repeat, or lead out of the folder"):
        SavedImages(str(tmp_path / "o"), ("a",), names=("../x",)).begin({})


# Metrics.


def test_a_metric_that_fails_leaves_the_others(
    options: list[str], images: Path, real: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = write_clip(tmp_path / "broken", seed=1)
    weights = load_file(broken / "open_clip_model.safetensors")
    weights["visual.proj"] = torch.full_like(weights["visual.proj"], float("nan"))
    save_file(weights, broken / "open_clip_model.safetensors")
    options[-1] = f"clip_unit={broken}"
    out = tmp_path / "out.json"
    said = refusal(
        main,
        ["--images", images, "--reference", real, "--metrics", "cmmd", "fid", *options, "--out", out],
        capsys,
    )
    assert "1 of the metrics failed, the others are kept (cmmd: " in said and "not finite" in said
    result = json.loads(out.read_text())
    assert result["fid"] > 0
    assert "cmmd" not in result["metrics"]
    assert "not finite" in result["failed"]["cmmd"]


def test_precision_and_recall_of_torch_fidelity_are_not_inceptions() -> None:
    with pytest.raises(UserError, match="VGG-16"):
        IMAGE_PROTOCOLS["torch-fidelity"].measurement("precision_recall")
    assert IMAGE_PROTOCOLS["clean"].measurement("precision_recall").network == "inception:clean"


def test_patch_fid_of_images_smaller_than_a_patch_is_no_number(
    options: list[str],
    images: Path,
    real: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    patch = Measurement("patch_fid", "clip_image:vit-b-32", ("crop 41",), ("crop 41",))
    monkeypatch.setitem(
        IMAGE_PROTOCOLS, "any", ImageProtocol("any", (patch, Measurement("fid", "clip_image:vit-b-32")))
    )
    said = refusal(
        main, ["--images", images, "--reference", real, *options, "--out", tmp_path / "out.json"], capsys
    )
    assert "patch FID crops 41 x 41 pixels out of each image, but an image has 40 x 40" in said
    assert json.loads((tmp_path / "out.json").read_text())["fid"] > 0


def test_distances_of_one_image_are_refused(refused: Refused, tmp_path: Path, real: Path) -> None:
    # torchmetrics 1652: FID of one image ended in NaN.
    one = write_images(tmp_path / "one", ["a.png"])
    assert "fid needs at least 2 images on each side, got 1 and 20" in refused(
        "--images", one, "--reference", real, "--metrics", "fid"
    )
    assert "fid needs at least 2 images on each side, got 20 and 1" in refused(
        "--images", real, "--reference", one, "--metrics", "fid"
    )


def test_equal_sets_have_distance_zero_and_never_less(run: Run, real: Path) -> None:
    # torch-fidelity 44, piq 283: a set against itself came out below or far above zero.
    result = run("--images", real, "--reference", real, "--metrics", "fid", "cmmd")
    for name in ("fid", "cmmd"):
        entry = result["metrics"][name]
        assert 0 <= entry["value"] < 1e-6
        assert entry["low"] >= 0


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("a.json", [{"caption": ["a dog", "a hound"]}], "a caption is ['a dog', 'a hound'], but must be a string"),
        ("a.json", [{"caption": {"en": "a dog"}}], "a caption is {'en': 'a dog'}, but must be a string"),
        ("a.jsonl", {"prompt": 5}, "a caption is 5, but must be a string"),
        ("a.txt", "a dog\na\0cat\n", "holds zero characters in caption number 2"),
        ("a.json", '{"k1": {"prompt": "a"}, "k1": {"prompt": "b"}}', "an object has the key 'k1' twice"),
        ("a.jsonl", '{"prompt": "a", "prompt": "b"}', "an object has the key 'prompt' twice"),
        ("a.json", ["a dog", "a \ud800 cat"], "has half of a surrogate pair in caption number 2"),
        ("a.json", [{"file_name": None, "caption": "a"}, {"file_name": "1", "caption": "b"}], "1 of 2 rows have no file_name"),
        ("a.csv", "caption,Caption\na,b\n", "two columns are called caption"),
        ("a.csv", "file_name,file_name,caption\n0.png,1.png,a\n", "two columns are called file_name"),
        ("a.json", {"images": [{"id": 1, "file_name": "1.jpg"}],
                    "annotations": [{"id": 1, "image_id": 1, "caption": None}]}, "has a caption without words (number 1)"),
        ("a.json", {"images": [{"id": 1, "file_name": "1.jpg"}, {"id": 1, "file_name": "2.jpg"}],
                    "annotations": [{"id": 1, "image_id": 1, "caption": "a"}]}, "two images have the id 1: 1.jpg and 2.jpg"),
        ("a.json", {"images": [{"id": 1, "file_name": "1.jpg"}],
                    "annotations": [{"id": 1, "image_id": 1.5, "caption": "a"}]}, "an id is 1.5, but must be a whole number"),
    ],
)  # fmt: skip
def test_a_caption_that_nobody_wrote_is_refused(
    tmp_path: Path, file: str, content: Any, message: str
) -> None:
    (tmp_path / file).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError) as refused:
        read_prompts(tmp_path / file)
    assert message in str(refused.value)


def test_hidden_files_are_no_prompts(tmp_path: Path) -> None:
    """macOS writes ._0.txt beside 0.txt on disks that are not its own."""
    (tmp_path / "0.txt").write_text("a dog")
    (tmp_path / "._0.txt").write_bytes(b"\0\5\x16\7\xff")
    assert read_prompts(tmp_path).captions == ("a dog",)
    (tmp_path / "1.TXT").write_text("a cat")
    assert read_prompts(tmp_path).captions == ("a dog", "a cat")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "2.txt").write_text("a cow")
    with pytest.raises(UserError, match=r"more/2\.txt' is in a folder below"):
        read_prompts(tmp_path)


@pytest.mark.parametrize("scale", [1e200, 1e308])
def test_statistics_whose_distances_overflow_are_refused(tmp_path: Path, scale: float) -> None:
    for name, mean, covariance in (("mu", scale, 1.0), ("sigma", 0.0, scale)):
        np.savez(tmp_path / f"{name}.npz", mu=np.full(3, mean), sigma=covariance * np.eye(3))
        with pytest.raises(ValueError, match="no mean .* and covariance .* of finite numbers"):
            FeatureStatistics.load(tmp_path / f"{name}.npz")


def test_images_of_a_zip_file_are_all_there(images: Path, tmp_path: Path) -> None:
    """Of two members of one name zipfile reads the last; one without ending would be left out."""
    for name, members, message in (
        ("twice.zip", ("0.png", "1.png", "0.png"), "holds several files called '0.png'"),
        ("unnamed.zip", ("0.png", "1"), "holds the image '1', whose name has no ending"),
    ):
        with zipfile.ZipFile(tmp_path / name, "w") as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # zipfile's own, about the name
            for number, member in enumerate(members):
                archive.write(images / f"{number}.png", member)
            archive.writestr("LICENSE", "no image")
        with pytest.raises(UserError, match=message):
            open_images(str(tmp_path / name))
