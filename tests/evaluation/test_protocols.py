"""Protocols of published images: what they fix, the prompts they choose, the images they read."""

from __future__ import annotations

import csv
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import center_crop

from data.shards.writer import ShardWriter
from evaluation.images.image_sets import open_images
from evaluation.images.prompt_files import read_prompts
from evaluation.images.prompt_list import PromptList
from evaluation.images.samples import StoredSamples
from evaluation.images.shard_images import ShardImages
from evaluation.networks.clip_models import CLIP_PRESETS
from evaluation.networks.image_steps import apply_steps, still_to_do
from evaluation.protocols import metric_table, names
from evaluation.protocols.image_protocol import (
    DEFAULT_NETWORKS,
    INCEPTION_METRICS,
    hashed_settings,
    metric_hash,
)
from evaluation.protocols.protocols import IMAGE_PROTOCOLS, NAMES, PROTOCOLS, find_protocol
from sdxs_lightning.core.errors import UserError
from tests.helpers.metric_networks import random_images


def pil_image(seed: int, width: int = 40, height: int = 30) -> Image.Image:
    frame = random_images(1, seed, 64)[0].permute(1, 2, 0).numpy()
    return Image.fromarray(frame).resize((width, height))


def same(first: Image.Image, second: Image.Image) -> bool:
    return np.array_equal(np.asarray(first), np.asarray(second))


# Names, hashes.


def test_the_toy_protocols_kept_their_fingerprints() -> None:
    assert {name: protocol.fingerprint() for name, protocol in PROTOCOLS.items()} == {
        "toy": "9ef420a86efb",
        "toy-val": "d686712f53e7",
    }


def test_every_named_protocol_is_there_and_says_where_it_is_from() -> None:
    wanted = {
        "coco2017-5k", "coco2014-30k-256", "coco2014-10k-512", "bk-sdm", "clean", "torch-fidelity", "pytorch-fid",
        "torchmetrics", "toy", "toy-val",
    }  # fmt: skip
    assert set(NAMES) == wanted
    for name in IMAGE_PROTOCOLS:
        assert find_protocol(name).name == name
        assert IMAGE_PROTOCOLS[name].source
    with pytest.raises(ValueError, match="no protocol named 'coco'; there are toy, toy-val, coco2017-5k"):
        find_protocol("coco")


def test_published_settings() -> None:
    dmd2, sdxl, bk = (IMAGE_PROTOCOLS[n] for n in ("coco2014-30k-256", "coco2014-10k-512", "bk-sdm"))
    assert (dmd2.samples, sdxl.samples, bk.samples, IMAGE_PROTOCOLS["coco2017-5k"].samples) == (
        30_000, 10_000, 30_000, 5000,
    )  # fmt: skip
    assert (
        dmd2.measurement("fid").steps
        == dmd2.measurement("fid").reference_steps
        == ("crop", "resize 256 lanczos")
    )
    assert sdxl.measurement("patch_fid").steps == ("crop 299",)
    assert sdxl.measurement("clip_score").steps == ("crop", "resize 256 lanczos")
    assert bk.measurement("fid").network == "inception:pytorch-fid"
    assert bk.measurement("fid").steps == ("jpeg 75", "resize 256 bicubic", "jpeg 75")
    assert bk.measurement("kid").network == "inception:pytorch-fid"
    assert bk.measurement("kid").reference_steps == bk.measurement("fid").reference_steps
    assert (
        CLIP_PRESETS[bk.measurement("clip_score").network.removeprefix("clip_text:")].tag
        == "laion2b_s34b_b88k"
    )
    assert (
        CLIP_PRESETS[dmd2.measurement("clip_score").network.removeprefix("clip_text:")].tag
        == "laion2b_s12b_b42k"
    )
    for metric in (*INCEPTION_METRICS, *DEFAULT_NETWORKS):
        assert dmd2.measurement(metric).metric == metric
    with pytest.raises(UserError, match="no metric named 'is'; there are aesthetic, clip_score, cmmd"):
        dmd2.measurement("is")


def test_a_hash_follows_what_changes_a_number() -> None:
    protocol = IMAGE_PROTOCOLS["bk-sdm"]
    base: tuple[Any, ...] = (
        protocol,
        protocol.measurement("fid"),
        {"weights": "a"},
        100,
        "lossless",
        None,
        "r",
    )
    changes = {
        0: IMAGE_PROTOCOLS["clean"],
        1: protocol.measurement("kid"),
        2: {"weights": "b"},
        3: 101,
        4: "jpg",
        5: "c",
        6: "s",
    }
    hashes = [metric_hash(hashed_settings(*base))]
    for place, value in changes.items():
        hashes.append(metric_hash(hashed_settings(*(*base[:place], value, *base[place + 1 :]))))
    assert len(set(hashes)) == len(changes) + 1
    assert all(len(one) == 12 for one in hashes)
    assert metric_hash(json.loads(json.dumps(hashed_settings(*base)))) == hashes[0]


# Prompts.


def coco(folder: Path, images: int = 6) -> Path:
    """Annotations with three captions an image, the second with the smallest id, images in another order."""
    content = {
        "images": [
            {"id": 10 * i, "file_name": f"COCO_val2014_{10 * i:012d}.jpg"} for i in reversed(range(images))
        ],
        "annotations": [
            one
            for i in range(images)
            for one in (
                {"id": 100 + i, "image_id": 10 * i, "caption": f"second of {i}"},
                {"id": 50 + i, "image_id": 10 * i, "caption": f"first\n of {i} "},
                {"id": 70 + i, "image_id": 10 * i, "caption": f"third of {i}"},
            )
        ],
    }
    path = folder / "captions_val2014.json"
    path.write_text(json.dumps(content))
    return path


def test_coco_gives_one_caption_an_image_by_image_id(tmp_path: Path) -> None:
    found = read_prompts(coco(tmp_path))
    assert found.captions == tuple(f"first of {i}" for i in range(6))
    assert found.names is not None and found.names[1] == "COCO_val2014_000000000010.jpg"
    assert found.of_images(["x/COCO_val2014_000000000030.png", "COCO_val2014_000000000000.png"], "f") == [
        "first of 3", "first of 0",
    ]  # fmt: skip
    large, small = found.selection(5, "f"), found.selection(3, "f")
    assert large.captions[:3] == small.captions != found.captions[:3]
    assert len(set(large.captions)) == 5
    assert [c.split()[-1] for c in large.captions] == [str(int(n[-6:-4]) // 10) for n in large.names or ()]
    assert found.digest() != small.digest()
    with pytest.raises(UserError, match=r"asks for 7 prompts, but 'f' has 6; .*--samples 6"):
        found.selection(7, "f")


def test_every_kind_of_list_gives_the_same_captions(tmp_path: Path) -> None:
    captions = ("a red circle", "a dog, sitting", "ein Bär")
    rows = [{"file_name": f"{i}.jpg", "text": caption} for i, caption in enumerate(captions)]
    (tmp_path / "a.txt").write_text("\n".join(captions) + "\n\n", encoding="utf-8")
    (tmp_path / "a.json").write_text(json.dumps(captions))
    (tmp_path / "b.json").write_text(json.dumps(rows))
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ("file_name", "text"))
        writer.writeheader()
        writer.writerows(rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.txt", "a.json", "b.json", "a.csv", "a.parquet"):
        found = read_prompts(tmp_path / name)
        assert found.captions == captions, name
        assert found.selection(2, "f").captions == captions[:2]  # published lists keep their order
        assert (found.names is None) == (name in ("a.txt", "a.json"))


def test_bad_prompt_files_are_one_sentence(tmp_path: Path) -> None:
    def refused(name: str, content: str) -> str:
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError) as caught:
            read_prompts(tmp_path / name)
        return str(caught.value)

    assert "no column named caption, text" in refused("a.csv", "x,y\n1,2\n")
    assert "without words (number 2)" in refused("b.csv", 'caption\na\n" "\n')
    assert "cannot be read as json" in refused("a.json", "{")
    assert "neither a list nor COCO's" in refused("b.json", "{}")
    assert "holds no caption" in refused("a.txt", "\n")
    assert "ends in '.pkl'; it takes .json, .txt" in refused("a.pkl", "")
    with pytest.raises(UserError, match="there is no such file"):
        read_prompts(tmp_path / "none.txt")
    with pytest.raises(UserError, match="3 images and 2 captions in 'f'"):
        PromptList(("a", "b")).of_images(["1", "2", "3"], "f")
    with pytest.raises(UserError, match="no caption for 1 of 2 images, the first of them 'y.png'"):
        PromptList(("a",), ("x.jpg",)).of_images(["x.png", "y.png"], "f")


# Steps.


def test_steps_equal_pillow_and_torchvision(tmp_path: Path) -> None:
    image = pil_image(0, 41, 30)
    assert same(apply_steps(image, ["crop"]), center_crop(image, [30, 30]))
    assert same(apply_steps(image, ["crop 20"]), center_crop(image, [20, 20]))
    assert apply_steps(image, ["crop 31"]).size == (41, 30)  # too small: left alone
    expected = center_crop(image, [30, 30]).resize((16, 16), Image.Resampling.LANCZOS)
    assert same(apply_steps(image, ["crop", "resize 16 lanczos"]), expected)
    image.resize((16, 16)).save(tmp_path / "a.jpg")  # BK-SDM's line: Pillow's default filter and quality
    assert same(apply_steps(image, ["resize 16 bicubic", "jpeg 75"]), Image.open(tmp_path / "a.jpg"))
    assert apply_steps(image, []) is image
    for wrong in ("crop x", "resize 16", "resize 16 cubic", "jpeg 0", "blur"):
        with pytest.raises(ValueError, match="no image step"):
            apply_steps(image, [wrong])


def test_files_that_went_through_a_step_do_not_go_again() -> None:
    steps = IMAGE_PROTOCOLS["bk-sdm"].measurement("fid").steps
    assert still_to_do(steps, False, (512, 512)) == steps
    assert still_to_do(steps, True, (512, 512)) == steps[1:]
    assert still_to_do(steps, True, (256, 256)) == ()
    lossless = IMAGE_PROTOCOLS["coco2014-30k-256"].measurement("fid").steps
    assert still_to_do(lossless, True, (512, 512)) == lossless


# Sources.


def write_set(folder: Path, count: int = 5) -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        pil_image(i).save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text(f"caption {i}")


def test_folder_zip_and_shards_are_the_same_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_set(tmp_path / "set")
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for path in (tmp_path / "set").iterdir():
            archive.write(path, f"set/{path.name}")
    with ShardWriter(tmp_path / "shards", samples_per_shard=2) as writer:
        for i in range(5):
            content = (tmp_path / "set" / f"{i:03d}.png").read_bytes()
            writer.write({"png": content, "txt": f"caption {i}"}, f"{i:03d}")
    sources = [open_images(str(tmp_path / name)) for name in ("set", "set.zip", "shards")]
    monkeypatch.setattr("evaluation.images.shard_images.INDEX_FOLDER", tmp_path / "index")
    remote = open_images(f"file://{tmp_path}/shards/{{00000..00002}}.tar")
    for source in (*sources, remote, pickle.loads(pickle.dumps(remote))):
        assert len(source.names) == 5
        assert source.formats == "png"
        for number in (4, 0, 2):
            assert same(source.read(number), pil_image(number))
    folder, zipped, shards = sources
    assert folder.captions() == shards.captions() == [f"caption {i}" for i in range(5)]
    assert zipped.captions() is None
    digest, stamp = folder.digest(), folder.stamp()
    assert digest == zipped.digest()
    content = (tmp_path / "set" / "004.png").read_bytes()
    (tmp_path / "set" / "004.png").write_bytes(content)
    again = open_images(str(tmp_path / "set"))
    assert (again.digest() == digest, again.stamp() == stamp) == (True, False)
    (tmp_path / "set" / "004.png").write_bytes(content + b"longer")
    assert again.digest() != digest
    assert StoredSamples(folder, 3).count == 3
    assert StoredSamples(shards).count == 5


def test_bad_images_are_one_sentence(tmp_path: Path) -> None:
    write_set(tmp_path / "set")
    (tmp_path / "set" / "001.png").write_bytes((tmp_path / "set" / "001.png").read_bytes()[:200])
    with pytest.raises(UserError, match=r"001\.png: the image cannot be decoded"):
        open_images(str(tmp_path / "set")).read(1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no image; images end in \.png"):
        open_images(str(tmp_path / "empty"))
    with pytest.raises(UserError, match="there is nothing at"):
        open_images(str(tmp_path / "nowhere"))
    (tmp_path / "a.zip").write_text("no zip")
    with pytest.raises(UserError, match="cannot be read as a zip file"):
        open_images(str(tmp_path / "a.zip"))
    with ShardWriter(tmp_path / "latents") as writer:
        writer.write({"txt": "words alone"}, "a")
    with pytest.raises(UserError, match=r"key 'a': there is no image"):
        ShardImages(str(tmp_path / "latents")).read(0)


def test_formats_say_whether_images_were_compressed(tmp_path: Path) -> None:
    write_set(tmp_path / "set", 2)
    assert StoredSamples(open_images(str(tmp_path / "set"))).formats == "lossless"
    pil_image(5).save(tmp_path / "set" / "005.jpg")
    assert StoredSamples(open_images(str(tmp_path / "set"))).formats == "jpg+png"
    assert torch.is_tensor(random_images(1))


def test_the_light_names_are_those_of_the_tables() -> None:
    assert (*PROTOCOLS, *IMAGE_PROTOCOLS) == names.PROTOCOL_NAMES
    assert tuple(PROTOCOLS) == names.TOY_PROTOCOLS
    assert {*names.NETWORK_KINDS, "renderer"} == set(metric_table._LOADERS)  # the renderer has no weights
    assert set(names.METRIC_NAMES) == {
        *DEFAULT_NETWORKS,
        *INCEPTION_METRICS,
        "caption_accuracy",
        "shape_score",
    }
    assert tuple(metric_table.FEATURE_SETS) == names.FEATURE_SET_METRICS
