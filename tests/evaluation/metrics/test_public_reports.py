"""Wrong values that users of other tools reported, and the right ones here.

torchmetrics 1027 (sets of different sizes), 1628 (float32), 1652 (one image), 2000 (captions over 77 tokens); pytorch-fid 13
(fewer images than features); torch-fidelity 58 (precision and recall swapped) and its numbers that move with the batch size;
clean-fid 33 (order of arguments), pytorch-fid 40 (grey images); open_clip 771 (QuickGELU); datasets 7055 (samples of
different members).
"""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from data.shards.index import index_shard
from data.shards.layout import Part, sample_rows
from evaluation.images.image_sets import open_images
from evaluation.metrics.frechet import FrechetDistance
from evaluation.metrics.kernel_distance import KernelDistance
from evaluation.metrics.precision_recall import PrecisionRecall
from evaluation.networks import clip_loading
from evaluation.networks.clip_loading import load_open_clip
from evaluation.networks.frozen_clip import FrozenClip
from tests.helpers.tiny_run import ROOT


def features(count: int, seed: int, dimensions: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dimensions, generator=generator) * torch.arange(1, dimensions + 1) ** -0.5


def fid(fake: Tensor, real: Tensor) -> float:
    metric = FrechetDistance(lambda images: images, fake.shape[1])
    metric.add(fake)
    metric.add(real, real=True)
    return float(metric.compute())


def closed_form(fake: Tensor, real: Tensor) -> float:
    """By numpy in float64; the trace of the root from the singular values of the two centred sets."""
    sides = [side.double().numpy() for side in (fake, real)]
    roots = [(side - side.mean(0)) / np.sqrt(len(side) - 1) for side in sides]
    trace = (
        sum((root**2).sum() for root in roots)
        - 2 * np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum()
    )
    return float(((sides[0].mean(0) - sides[1].mean(0)) ** 2).sum() + trace)


def test_fid_of_sets_of_different_sizes() -> None:
    fake, real = features(37, 1), features(211, 2) + 0.3
    assert fid(fake, real) == pytest.approx(closed_form(fake, real), rel=1e-10)
    assert fid(real, fake) == pytest.approx(fid(fake, real), rel=1e-10)


def test_fid_of_features_far_from_zero_keeps_its_digits() -> None:
    # Sums of squares in float32 lose the spread of 0.1 beside the mean of 1000.
    fake, real = 1000 + 0.1 * features(300, 1), 1000.02 + 0.1 * features(300, 2)
    assert fid(fake, real) == pytest.approx(closed_form(fake, real), rel=1e-6)
    summed = FrechetDistance(lambda images: images, 12)
    for side, is_real in ((fake, False), (real, True)):
        for part in side.split(7):
            summed.add(part, real=is_real)
    assert float(summed.compute()) == pytest.approx(closed_form(fake, real), rel=1e-6)


def test_fid_of_fewer_images_than_features_is_real() -> None:
    fake, real = features(9, 1, 64), features(14, 2, 64)
    found = fid(fake, real)
    assert found == pytest.approx(closed_form(fake, real), rel=1e-9) and found > 0
    assert fid(fake, fake) == pytest.approx(0.0, abs=1e-9)


def test_a_collapsed_generator_has_precision_and_no_recall() -> None:
    real = features(400, 1)
    fake = real[:1] + 1e-3 * features(400, 2)
    metric = PrecisionRecall(lambda images: images, real)
    metric.add(fake, range(400))
    found = metric.estimates()
    assert found["precision"].value == 1.0 and found["recall"].value < 0.02
    spread = PrecisionRecall(lambda images: images, real)
    spread.add(3 * features(400, 3), range(400))
    assert spread.estimates()["precision"].value < 0.6 < spread.estimates()["recall"].value


@pytest.mark.parametrize("name", ["fid", "kid"])
def test_numbers_do_not_move_with_the_batch_size(name: str) -> None:
    fake, real = features(101, 1), features(120, 2)

    def by(batch: int) -> float:
        metric = (
            FrechetDistance(lambda images: images, 12)
            if name == "fid"
            else KernelDistance(lambda images: images, subsets=4, subset_size=50)
        )
        for side, is_real in ((fake, False), (real, True)):
            ids = torch.arange(len(side))
            for rows, numbers in zip(side.split(batch), ids.split(batch), strict=True):
                metric.add(rows, numbers, real=is_real)
        return metric.estimates()[name].value

    assert by(1) == pytest.approx(by(64), rel=1e-12) == pytest.approx(by(1000), rel=1e-12)


def test_grey_images_are_three_equal_channels(tmp_path: Path) -> None:
    grey = np.random.default_rng(1).integers(0, 256, (9, 11), dtype=np.uint8)
    for name in ("L", "1", "LA"):
        (tmp_path / name).mkdir()
        Image.fromarray(grey).convert(name).save(tmp_path / name / "0.png")
    read = [np.asarray(open_images(str(tmp_path / name)).read(0)) for name in ("L", "1", "LA")]
    assert (read[0] == grey[..., None]).all() and read[0].shape == (9, 11, 3)
    assert (read[2] == read[0]).all()
    assert set(np.unique(read[1])) == {0, 255}


def test_captions_beyond_the_context_keep_their_differences() -> None:
    clip = FrozenClip(ROOT / "data" / "toy" / "clip")
    words = "a red circle above a blue square "
    first, second = words * 3, "a small green triangle left of " + words * 3
    ids = clip.tokenize([first, second, first])
    assert ids.shape[1] == 16 and (ids[:, -1] == clip.eos_token_id).all()
    assert not torch.equal(ids[0], ids[1]) and torch.equal(ids[0], ids[2])


def test_openai_weights_run_with_quick_gelu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[bool] = []

    def create_model(*_: object, force_quick_gelu: bool, **__: object) -> None:
        asked.append(force_quick_gelu)
        raise RuntimeError("stop here")

    monkeypatch.setattr("open_clip.create_model", create_model)
    weights = tmp_path / "w.safetensors"
    weights.write_bytes(b"")
    for tag in ("openai", "laion2b_s34b_b79k"):
        with pytest.raises(FileNotFoundError, match="stop here"):
            load_open_clip("ViT-B-32", tag, weights)
    assert asked == [True, False]
    assert clip_loading.OPENAI_MEAN[0] == pytest.approx(0.48145466)


def test_samples_of_different_members_are_all_read_or_named(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    members = ["0.jpg", "0.txt", "1.jpg", "1.png", "1.txt", "sub/2.jpg", "sub/2.txt", "3.jpg"]
    with tarfile.open(path, "w") as made:
        for name in members:
            info = tarfile.TarInfo(name)
            info.size = 1
            made.addfile(info, io.BytesIO(b"x"))
    index = index_shard(path)
    assert [index.key(row) for row in range(len(index))] == ["0", "1", "sub/2", "3"]
    assert set(index.members(1)) == {"jpg", "png", "txt"}
    rows = sample_rows(index, [Part("captions", ("txt",))])
    assert [start >= 0 for start in rows[:, 0]] == [True, True, True, False]
