"""Inputs that gave a wrong number without a word: the right number, or a refusal before anything is measured."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from data.shards.writer import ShardWriter
from evaluation.evaluate import main
from evaluation.images.image_sets import open_images
from evaluation.metrics.frechet import FeatureStatistics
from evaluation.protocols.image_protocol import ImageProtocol, Measurement
from evaluation.protocols.protocols import IMAGE_PROTOCOLS
from sdxs_lightning.core.errors import UserError
from sdxs_lightning.core.model_hash import hash_model, hash_weights
from tests.helpers.evaluated_images import (
    COUNT,
    WORDS,
    Refused,
    Run,
    captions,
    write_images,
)
from tests.helpers.metric_networks import write_clip
from tests.helpers.refusals import refusal
from tests.helpers.tiny import save_tiny_sd

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


def test_a_model_hash_is_over_linked_folders_too(tmp_path: Path) -> None:
    """A pipeline may take its VAE or its U-Net from another folder by a link."""
    base = save_tiny_sd(tmp_path / "sd")
    first, weights = hash_model(base), hash_weights(base)
    (base / "unet").rename(tmp_path / "unet")
    (base / "unet").symlink_to(tmp_path / "unet")
    (base / "unet" / "back").symlink_to(base)  # which is not followed for ever
    assert (hash_model(base), hash_weights(base)) == (first, weights)
    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors[min(tensors)] += 1
    save_file(tensors, file, {"format": "pt"})
    assert hash_model(base) != first and hash_weights(base) != weights


def test_shards_are_known_by_their_images_alone(tmp_path: Path) -> None:
    """Not by sizes, which other images may share, nor by captions, of which FID knows nothing."""
    digests = []
    for seed, words in ((0, "a"), (1, "a"), (0, "longer words")):
        folder = tmp_path / f"{seed}{words}"
        with ShardWriter(folder, samples_per_shard=2) as writer:
            for number in range(3):
                stream = io.BytesIO()
                pixels = np.random.RandomState(seed + number).randint(0, 256, (8, 8, 3), np.uint8)
                Image.fromarray(pixels).save(stream, "PNG", compress_level=0)
                writer.write({"png": stream.getvalue(), "txt": words}, f"{number}")
        digests.append(open_images(str(folder)).digest())
    assert digests[0] == digests[2] != digests[1]


# References.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigma": -np.eye(16)}, "negative eigenvalue -1"),
        ({"sigma": np.diag([1.0] * 15 + [-0.5])}, "negative eigenvalue -0.5"),
        ({"sigma": np.eye(16) + np.triu(np.ones((16, 16)), 1) * 0.1}, "not symmetric"),
        ({"sigma": np.zeros((16, 16))}, "images that are all equal"),
        ({"n": 5}, "5 images have a covariance with at most 4 eigenvalues"),
        ({"n": 2**62}, "statistics are of 2 to 1,000,000,000,000 images"),
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
    np.savez(tmp_path / "b.npz", mu=features.mean(0).numpy(), sigma=covariance, n=10)
    assert FeatureStatistics.load(tmp_path / "b.npz").count == 10


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


@pytest.mark.parametrize("scale", [1e200, 1e308])
def test_statistics_whose_distances_overflow_are_refused(tmp_path: Path, scale: float) -> None:
    for name, mean, covariance in (("mu", scale, 1.0), ("sigma", 0.0, scale)):
        np.savez(tmp_path / f"{name}.npz", mu=np.full(3, mean), sigma=covariance * np.eye(3))
        with pytest.raises(ValueError, match="no mean .* and covariance .* of finite numbers"):
            FeatureStatistics.load(tmp_path / f"{name}.npz")
