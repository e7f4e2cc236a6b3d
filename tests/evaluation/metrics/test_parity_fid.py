"""The same numbers as torch-fidelity, clean-fid, pytorch-fid and torchmetrics, with one random Inception in all of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cleanfid.fid
import numpy as np
import pytest
import pytorch_fid.fid_score
import torch
import torch_fidelity
from PIL import Image
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torchmetrics.image.fid import NoTrainInceptionV3

from evaluation.metrics.frechet import FeatureStatistics, FrechetDistance, frechet_distance
from evaluation.metrics.inception_score import InceptionScore
from evaluation.networks.inception import (
    WEIGHT_FILES,
    InceptionFeatures,
    InceptionLogits,
    InceptionResize,
    find_weights,
)
from tests.helpers.random_inception import FirstLayer, first_layer, textures, write_inception

COUNT = 6
"""Images per side of whole pipelines."""


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In a hub cache of their own, under the name that pytorch-fid looks for."""
    return write_inception(tmp_path_factory.mktemp("hub") / "checkpoints" / WEIGHT_FILES[1])


@pytest.fixture(autouse=True)
def hub(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(weights.parent.parent))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two folders of PNGs."""
    out = tmp_path_factory.mktemp("images")
    for name, seed in (("fake", 1), ("real", 2)):
        (out / name).mkdir()
        for index, image in enumerate(textures(COUNT, seed)):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(out / name / f"{index:03d}.png")
    return out / "fake", out / "real"


def ours(weights: Path, resize: InceptionResize) -> float:
    metric = FrechetDistance(FirstLayer(InceptionFeatures(weights, resize)))
    for seed, real in ((1, False), (2, True)):
        metric.update(textures(COUNT, seed), sample_ids=range(COUNT), real=real)
    return float(metric.compute())


def spread_features(count: int, seed: int, dimensions: int = 48) -> Tensor:
    """Positive features with a falling spectrum, float32."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.arange(1, dimensions + 1) ** -0.6
    return torch.randn(count, dimensions, generator=generator) * scales + 0.3 + 0.2 * seed * scales


@pytest.mark.parametrize(
    "tool",
    [
        lambda f, g: fid_statistics_to_metric(
            fid_features_to_statistics(f), fid_features_to_statistics(g), False
        )["frechet_inception_distance"],
        lambda f, g: cleanfid.fid.fid_from_feats(f.double().numpy(), g.double().numpy()),
        lambda f, g: pytorch_fid.fid_score.calculate_frechet_distance(
            *(
                np.asarray(part)
                for side in (f.double().numpy(), g.double().numpy())
                for part in (side.mean(0), np.cov(side, rowvar=False))
            )
        ),
    ],
    ids=["torch-fidelity", "clean-fid", "pytorch-fid"],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_equal_features_give_equal_numbers(tool: Callable[[Tensor, Tensor], float]) -> None:
    fake, real = spread_features(300, 1), spread_features(400, 2)
    metric = FrechetDistance(lambda images: images, 48)
    metric.add(fake)
    metric.add(real, real=True)
    assert float(metric.compute()) == pytest.approx(tool(fake, real), rel=1e-6)


def test_features_of_the_whole_network(weights: Path) -> None:
    images = textures(1, 3, size=130)[..., :100]
    found = InceptionFeatures(weights, "torch-fidelity")(images)
    network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(weights))
    with torch.no_grad():
        expected = network(images)[0]
    assert found.shape == (1, 2048)
    assert float(found.std()) > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_inception_score_of_torch_fidelity(weights: Path) -> None:
    images = textures(2, 3, size=130)[..., :100]
    network = FeatureExtractorInceptionV3("inception-v3-compat", ["logits_unbiased"], str(weights))
    with torch.no_grad():
        expected = network(images)[0]
    logits = InceptionLogits(weights, "torch-fidelity")
    torch.testing.assert_close(logits(images), expected, rtol=1e-5, atol=1e-5)
    assert logits.identity()["network"] != InceptionFeatures(weights, "torch-fidelity").identity()["network"]
    rows = 3 * torch.randn(1003, 20, generator=torch.Generator().manual_seed(1))
    metric = InceptionScore(lambda images: images)
    metric.add(rows, range(1003))
    found = metric.estimates()["inception_score"]
    assert found.value == pytest.approx(isc_features_to_metric(rows)["inception_score_mean"], rel=1e-12)
    assert found.low is not None and found.high is not None and found.low < found.value < found.high
    same = InceptionScore(lambda images: images)
    same.add(torch.zeros(20, 20), range(20))
    assert same.estimates()["inception_score"].value == pytest.approx(1.0)


def test_the_resize_of_torchmetrics(weights: Path) -> None:
    images = textures(2, 3, size=130)[..., :100]
    with torch.no_grad():
        expected = NoTrainInceptionV3("inception-v3-compat", ["64"], str(weights))(images)
    found = FirstLayer(InceptionFeatures(weights, "torchmetrics"))(images)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    other = FirstLayer(InceptionFeatures(weights, "torch-fidelity"))(images)
    assert float((other - found).abs().max()) > 1e-3  # so the choice matters


def test_whole_pipeline_of_torch_fidelity(weights: Path, folders: tuple[Path, Path]) -> None:
    expected = torch_fidelity.calculate_metrics(
        input1=str(folders[0]),
        input2=str(folders[1]),
        fid=True,
        cuda=False,
        cache=False,
        verbose=False,
        feature_layer_fid="64",
        feature_extractor_weights_path=str(weights),
        samples_find_deep=False,
        save_cpu_ram=True,
    )["frechet_inception_distance"]
    assert ours(weights, "torch-fidelity") == pytest.approx(expected, rel=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_whole_pipeline_of_clean_fid(weights: Path, folders: tuple[Path, Path]) -> None:
    network = InceptionFeatures(weights).network

    def model(pixels: Tensor) -> Tensor:
        return first_layer(network, (pixels - 128) / 128)

    expected = cleanfid.fid.compare_folders(
        *map(str, folders), model, mode="clean", num_workers=0, device=torch.device("cpu"), verbose=False
    )
    # 1e-4 is asked for; Pillow's filter in float64 does better.
    assert ours(weights, "clean") == pytest.approx(expected, rel=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_whole_pipeline_of_pytorch_fid(weights: Path, folders: tuple[Path, Path]) -> None:
    expected = pytorch_fid.fid_score.calculate_fid_given_paths(
        [str(folder) for folder in folders], COUNT, torch.device("cpu"), 64, num_workers=0
    )
    assert ours(weights, "pytorch-fid") == pytest.approx(expected, rel=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_statistics_are_read_by_the_tools_and_from_them(
    weights: Path, folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake, real = (FeatureStatistics.from_features(spread_features(100, seed, 64)) for seed in (1, 2))
    fake.save(tmp_path / "fake.npz")
    real.save(tmp_path / "real.npz")
    expected = frechet_distance(fake.mean, fake.covariance, real.mean, real.covariance)
    paths = [str(tmp_path / "fake.npz"), str(tmp_path / "real.npz")]
    by_pytorch_fid = pytorch_fid.fid_score.calculate_fid_given_paths(paths, 1, torch.device("cpu"), 64)
    assert by_pytorch_fid == pytest.approx(expected, rel=1e-6)

    # clean-fid reads statistics from a folder inside its package, by name.
    monkeypatch.setattr(cleanfid, "__file__", str(tmp_path / "cleanfid" / "__init__.py"))
    stats = tmp_path / "cleanfid" / "stats"
    real.save(stats / "ours_clean_custom_na.npz")
    mu, sigma = cleanfid.features.get_reference_statistics("ours", "na", mode="clean", split="custom")
    assert np.array_equal(mu, real.mean.numpy())
    assert np.array_equal(sigma, real.covariance.numpy())

    written = tmp_path / "theirs.npz"
    pytorch_fid.fid_score.save_fid_stats([str(folders[1]), str(written)], COUNT, torch.device("cpu"), 64, 0)
    read = FeatureStatistics.load(written)
    assert read.count == 0
    features = FirstLayer(InceptionFeatures(weights, "pytorch-fid"))(textures(COUNT, 2))
    own = FeatureStatistics.from_features(features)
    torch.testing.assert_close(read.mean, own.mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(read.covariance, own.covariance, rtol=1e-4, atol=1e-9)


def test_weights_come_from_a_file_or_the_cache_or_a_clear_error(weights: Path, tmp_path: Path) -> None:
    assert find_weights() == weights
    with pytest.raises(
        FileNotFoundError, match=r"nowhere\.pth is missing; download https://.*or name the file by `weights`"
    ):
        find_weights(tmp_path / "nowhere.pth")
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth holds no FID Inception"):
        InceptionFeatures(tmp_path / "other.pth")
    with pytest.raises(ValueError, match="resize of Inception is one of clean, torch-fidelity"):
        InceptionFeatures(weights, "bilinear")  # type: ignore[arg-type]


def test_an_empty_cache_says_where_the_weights_belong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(FileNotFoundError, match=f"weights-inception.* in {tmp_path}/checkpoints is missing"):
        find_weights()


def test_precision_and_identity(weights: Path) -> None:
    clean, other = InceptionFeatures(weights), InceptionFeatures(weights, "pytorch-fid")
    images = textures(1, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = FirstLayer(clean)(images)
    assert torch.equal(under_autocast, FirstLayer(clean)(images))
    assert not under_autocast.requires_grad
    assert not any(module.training for module in clean.network.modules())
    assert clean.identity() == InceptionFeatures(weights).identity()
    assert clean.identity() != other.identity()
    with pytest.raises(TypeError, match=r"uint8 in 0\.\.255, got torch\.float32"):
        clean(images.float())
