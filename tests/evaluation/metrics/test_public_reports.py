"""Wrong values that users of other tools reported, and the right ones here.

torchmetrics 1027 (sets of different sizes), 1620 (features that depend on the batch), 1628 (float32), 1652 (one image),
2000 and 2883 (captions over 77 tokens); pytorch-fid 13 (fewer images than features), 40 (grey images); torch-fidelity 45
(fewer images than KID's subsets), 58 (precision and recall swapped); clean-fid 33 (order of arguments), 66 (a folder
against itself); open_clip 480 (members with dots), 771 (QuickGELU); datasets 7055 (samples of different members). Images of
different sizes (clean-fid 2, pytorch-fid 81, torch-fidelity 55) are in test_right_images.py.
"""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from data.shards.datamodule import ShardDataModule
from data.shards.decoders import BadSampleError
from data.shards.faults import Faults
from data.shards.index import index_shard
from data.shards.layout import Part, sample_rows
from evaluation.images.image_sets import open_images
from evaluation.metrics.frechet import FrechetDistance
from evaluation.metrics.kernel_distance import KernelDistance, polynomial, unbiased_mmd
from evaluation.metrics.precision_recall import PrecisionRecall
from evaluation.networks import clip_loading
from evaluation.networks.clip_loading import load_open_clip
from evaluation.networks.frozen_clip import FrozenClip
from evaluation.networks.inception import InceptionFeatures, InceptionResize
from tests.helpers.random_inception import FirstLayer, textures, write_inception
from tests.helpers.tiny_run import ROOT


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inception(tmp_path_factory.mktemp("inception") / "weights.pth")


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


def test_inceptions_features_do_not_move_with_the_batch_size(inception: Path) -> None:
    """FID was 10 for batches of 2 and 1.9 for batches of 1,000, by convolutions in TF32."""
    network, images = InceptionFeatures(inception, "torch-fidelity"), textures(3, 5)
    together = network(images)
    alone = torch.cat([network(image[None]) for image in images])
    # 94 convolutions, each of which may round its sums in another order.
    assert float((together - alone).norm() / together.norm()) < 94 * torch.finfo(torch.float32).eps
    assert float((together[0] - together[1]).norm() / together.norm()) > 0.01


@pytest.mark.parametrize("resize", ["clean", "torch-fidelity", "torchmetrics", "pytorch-fid"])
def test_images_against_themselves_have_distance_zero_by_any_resize(
    inception: Path, resize: InceptionResize
) -> None:
    metric = FrechetDistance(FirstLayer(InceptionFeatures(inception, resize)))
    images = textures(6, 1)
    metric.update(images, sample_ids=range(6))
    for ids in ([5, 4], [3, 2, 1], [0]):  # in another order, and other batches
        metric.update(images[ids], sample_ids=ids, real=True)
    assert float(metric.compute()) == pytest.approx(0.0, abs=1e-6)


def test_kid_of_fewer_images_than_a_subset_is_refused_and_has_a_value_in_smaller_ones() -> None:
    fake, real = features(87, 1), features(90, 2) + 0.3

    def kid(**settings: Any) -> KernelDistance:
        metric = KernelDistance(lambda images: images, **settings)
        metric.add(fake, range(len(fake)))
        metric.add(real, range(len(real)), real=True)
        return metric

    with pytest.raises(ValueError, match="needs at least 1000 fake images, got 87"):
        kid().compute()
    # The unbiased estimator over all of both sides, by its definition.
    x, y = fake.double(), real.double()
    exact = float(unbiased_mmd(polynomial(x, x), polynomial(x, y), polynomial(y, y)))
    assert exact == pytest.approx(
        sum(float((a @ b / 12 + 1) ** 3) for i, a in enumerate(x) for j, b in enumerate(x) if i != j)
        / (87 * 86)
        + sum(float((a @ b / 12 + 1) ** 3) for i, a in enumerate(y) for j, b in enumerate(y) if i != j)
        / (90 * 89)
        - 2 * sum(float((a @ b / 12 + 1) ** 3) for a in x for b in y) / (87 * 90),
        rel=1e-9,
    )
    subsets = kid(subsets=200, subset_size=40).estimates()["kid"]
    assert subsets.low is not None and subsets.high is not None
    assert subsets.low < exact < subsets.high and subsets.high - subsets.low > 0.1 * exact


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


def test_captions_beyond_the_context_have_the_score_of_what_fits() -> None:
    """The score fell from 26 to 17 with the caption's 76th word, where the end-of-text token was cut off."""
    clip = FrozenClip(ROOT / "data" / "toy" / "clip")
    image = torch.randint(
        0, 256, (1, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    captions = ["red " * count for count in range(1, 33)]
    ids = clip.tokenize(captions)
    assert (ids == clip.eos_token_id).any(-1).all()
    full = [i for i in range(len(ids)) if torch.equal(ids[i], ids[-1])]
    assert full == list(range(full[0], len(ids))) and len(full) > 8
    assert full[0] == 13  # 14 words, the start and the end are the context of 16 tokens
    scores = [float(clip.cosine(image, [captions[i]])) for i in full]
    assert scores == [scores[0]] * len(full)


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


@pytest.mark.parametrize("tolerant", [False, True])
def test_members_with_dots_are_refused_and_never_waited_for(tmp_path: Path, tolerant: bool) -> None:
    """`sample0.input.jpg` has no member jpg: each sample was left out, and the loader went round for ever."""
    with tarfile.open(tmp_path / "s.tar", "w") as made:
        for i in range(4):
            for name in ("input.jpg", "outputs.txt"):
                info = tarfile.TarInfo(f"sample{i:08d}.{name}")
                info.size = 1
                made.addfile(info, io.BytesIO(b"x"))
    faults = Faults(quarantine=str(tmp_path / "faults.jsonl")) if tolerant else None
    data = ShardDataModule(str(tmp_path / "s.tar"), 2, contents=["images"], faults=faults)
    with pytest.raises(
        BadSampleError, match="there is no caption .* outputs.txt: a key ends at the first dot"
    ):
        data.setup()
