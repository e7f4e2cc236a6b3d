"""Images that gave a wrong number without a word, read, made and saved: the right number, or a refusal."""

from __future__ import annotations

import json
import os
import shutil
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor

from evaluation.evaluate import main
from evaluation.images.image_sets import open_images
from evaluation.images.samples import ModelSamples
from evaluation.images.saved_images import SavedImages
from evaluation.metrics.frechet import frechet_distance
from evaluation.networks.frozen_clip import FrozenClip
from sdxs_lightning.core.errors import UserError
from tests.helpers.evaluated_images import (
    COUNT,
    WORDS,
    Run,
    captions,
    write_images,
)
from tests.helpers.refusals import refusal
from tests.helpers.tiny import save_tiny_sd, save_tiny_sdxl

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
    content = named.path(0).read_bytes()
    for damaged in (b"", content[:50], content[:-20] + bytes(20)):
        named.path(0).write_bytes(damaged)
        with pytest.raises(
            UserError, match=r"stanford_0\.png' cannot be read .*; remove it, and it is made again"
        ):
            named.read([0])
    with pytest.raises(UserError, match="repeat, or lead out of the folder"):
        SavedImages(str(tmp_path / "o"), ("a",), names=("../x",)).begin({})


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
