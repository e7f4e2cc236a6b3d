"""Metrics on features: against other implementations, without duplicates, whatever the batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import fmean
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from evaluation.metrics.diversity import PromptDiversity
from evaluation.metrics.estimates import SPLITS, student_t
from evaluation.metrics.feature_sets import FeatureSetMetric
from evaluation.metrics.frechet import FrechetDistance
from evaluation.metrics.kernel_distance import KernelDistance, MaximumMeanDiscrepancy
from evaluation.metrics.precision_recall import PrecisionRecall, inside, radii
from evaluation.metrics.sampled import PerImageMetric, SampledMetric


class Pixels:
    """A feature network: the pixels of a 2x2 image."""

    name = "pixels"
    dimensions = 12

    def __call__(self, images_uint8: Tensor) -> Tensor:
        return images_uint8.flatten(1).float()

    def identity(self) -> dict[str, str]:
        return {"network": "pixels"}


class Brightness(PerImageMetric):
    names = ("brightness",)

    def measure(self, images_uint8: Tensor, captions: Any = None) -> Tensor:
        return images_uint8.double().mean((1, 2, 3)).unsqueeze(1)


PIXELS = Pixels()
BUILDERS: dict[str, Callable[[], SampledMetric]] = {
    "fid": lambda: FrechetDistance(PIXELS),
    "kid": lambda: KernelDistance(PIXELS, subsets=5, subset_size=20),
    "cmmd": lambda: MaximumMeanDiscrepancy(PIXELS, sigma=200.0),
    "precision": lambda: PrecisionRecall(PIXELS),
}


def images(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    dark = torch.linspace(150, 256, 12).view(3, 2, 2) if seed else torch.full((3, 2, 2), 256)
    return (torch.rand(count, 3, 2, 2, generator=generator) * dark).floor().to(torch.uint8)


def number(metric: SampledMetric) -> list[float]:
    found = metric.compute()
    return [float(each) for each in (found.values() if isinstance(found, dict) else [found])]


@pytest.mark.parametrize("name", list(BUILDERS))
def test_batches_order_and_duplicates_do_not_matter(name: str) -> None:
    fake, real = images(60, 1), images(80, 0)
    plain, jumbled = BUILDERS[name](), BUILDERS[name]()
    plain.update(fake, sample_ids=range(60))
    plain.update(real, sample_ids=range(80), real=True)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    for part in order.split(7):
        jumbled.update(fake[part], sample_ids=part)
    jumbled.update(fake[:0], sample_ids=[])
    jumbled.update(fake[10:25], sample_ids=range(10, 25))  # as the padding of a sampler would
    jumbled.update(real[40:], sample_ids=range(40, 80), real=True)
    jumbled.update(real[:50], sample_ids=range(50), real=True)
    assert number(jumbled) == pytest.approx(number(plain), rel=1e-12)
    for ours, theirs in zip(jumbled.estimates().values(), plain.estimates().values(), strict=True):
        assert ours.samples == theirs.samples
        mine, wanted = ours.as_dict(), theirs.as_dict()
        assert mine.pop("left_out", ()) == pytest.approx(wanted.pop("left_out", ()), rel=1e-9)
        assert mine == pytest.approx(wanted, rel=1e-9)


def test_without_ids_every_image_counts() -> None:
    metric = Brightness()
    metric.update(images(3, 0))
    metric.update(images(3, 0))
    assert metric.count == 6
    assert metric.estimates()["brightness"].value == pytest.approx(float(images(3, 0).double().mean()))
    with_ids = Brightness()
    with_ids.update(images(3, 0), sample_ids=[0, 1, 2])
    with_ids.update(images(3, 0), sample_ids=[0, 1, 2])
    assert with_ids.count == 3


def test_kept_features_and_sums_give_the_same_distance() -> None:
    kept, summed = FrechetDistance(PIXELS), FrechetDistance(PIXELS)
    for seed, real in ((1, False), (0, True)):
        kept.update(images(50, seed), sample_ids=range(50), real=real)
        summed.update(images(50, seed), real=real)
    assert number(kept) == pytest.approx(number(summed), rel=1e-10)
    assert (
        kept.estimates()["fid"].infinity is not None
    )  # 50 images are more than three for each of 12 dimensions
    assert summed.estimates()["fid"].as_dict().keys() == {"value", "samples"}


def test_a_few_images_are_exact_and_never_complex() -> None:
    features_1, features_2 = torch.randn(2, 7, 40, generator=torch.Generator().manual_seed(0)).double()
    metric = FrechetDistance(lambda rows: rows, 40)
    metric.add(features_1.float(), range(7))
    metric.add(features_2.float(), range(7), real=True)
    centred = [side.float().double() - side.float().double().mean(0) for side in (features_1, features_2)]
    nuclear = torch.linalg.svdvals(centred[0] @ centred[1].T).sum() / 6
    spread = sum(side.square().sum() / 6 for side in centred) - 2 * nuclear
    shift = (features_1.float().double().mean(0) - features_2.float().double().mean(0)).square().sum()
    assert number(metric)[0] == pytest.approx(float(shift + spread), rel=1e-12)


def test_kid_is_torch_fidelitys() -> None:
    fake, real = torch.randn(2, 300, 24, generator=torch.Generator().manual_seed(0))
    real = 1.1 * real + 0.1
    metric = KernelDistance(PIXELS, reference=real, subsets=10, subset_size=100)
    metric.add(fake)
    expected = kid_features_to_metric(
        fake.double(), real.double(), kid_subsets=10, kid_subset_size=100, verbose=False, rng_seed=2020
    )
    assert number(metric)[0] == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-9)
    found = metric.estimates()["kid"]
    assert found.low is not None and found.low < found.value


def test_recalls_interval_counts_the_real_images_that_one_half_alone_covers() -> None:
    generator = torch.Generator().manual_seed(3)
    real, fake = torch.randn(400, 4, generator=generator), 0.8 * torch.randn(80, 4, generator=generator)
    draws = torch.Generator().manual_seed(0)
    squares, own = [], []
    for _ in range(SPLITS):
        order = torch.randperm(80, generator=draws)
        halves = (fake[order[:40]], fake[order[40:]])
        first, second = (inside(real, half, radii(half, 3)) for half in halves)
        squares.append(float(first.mean() - second.mean()) ** 2 / 2)
        own.append(float((first - second).square().sum()) / 2 / 400**2)
    of_halves, alone = fmean(squares), fmean(own)
    assert 0.05 * of_halves < alone < 0.9 * of_halves
    half_width = student_t(10) * math.sqrt(0.6 * alone + (of_halves - alone) / 2)
    found = PrecisionRecall(PIXELS, reference=real)
    found.add(fake)
    recall = found.estimates()["recall"]
    assert recall.high is not None and recall.high < 1
    assert recall.high - recall.value == pytest.approx(half_width, rel=1e-5)


def test_precision_and_recall_are_torch_fidelitys_and_not_swapped() -> None:
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(200, 4, generator=generator)
    fake = 0.3 * torch.randn(150, 4, generator=generator)  # true to the middle, blind to the rest
    metric = PrecisionRecall(PIXELS, reference=real)
    metric.add(fake)
    found = {name: estimate.value for name, estimate in metric.estimates().items()}
    expected = prc_features_to_metric(fake, real, verbose=False, save_cpu_ram=True)
    assert found["precision"] == pytest.approx(expected["precision"], abs=1e-6)
    assert found["recall"] == pytest.approx(expected["recall"], abs=1e-6)
    assert found["precision"] > 0.9 > 0.6 > found["recall"]


def test_cmmd_is_the_mean_over_all_pairs() -> None:
    fake, real = torch.randn(2, 30, 6, generator=torch.Generator().manual_seed(0))
    metric = MaximumMeanDiscrepancy(PIXELS, reference=real)
    metric.add(fake)

    def kernel(x: Tensor, y: Tensor) -> float:
        pairs = [(a - b).square().sum() for a in x.double() for b in y.double()]
        return float(torch.exp(-torch.stack(pairs) / 200).mean())

    expected = 1000 * (kernel(fake, fake) + kernel(real, real) - 2 * kernel(fake, real))
    assert number(metric)[0] == pytest.approx(expected, rel=1e-9)


def test_diversity_is_the_mean_distance_of_pairs_of_a_prompt() -> None:
    metric = PromptDiversity(PIXELS, samples_per_prompt=3)
    shown = images(6, 0)
    metric.update(shown, sample_ids=range(6))
    unit = torch.nn.functional.normalize(PIXELS(shown).double())
    pairs = [(0, 1), (0, 2), (1, 2), (3, 4), (3, 5), (4, 5)]
    expected = sum(float((unit[i] - unit[j]).norm()) for i, j in pairs) / 6
    assert number(metric)[0] == pytest.approx(expected, rel=1e-6)
    metric.update(shown[:1], sample_ids=[6])
    with pytest.raises(ValueError, match=r"needs 3 images of every prompt, found between 1 and 3"):
        metric.compute()


def test_refusals() -> None:
    metric = FrechetDistance(PIXELS)
    with pytest.raises(ValueError, match="fid of 2 images with 1 sample ids"):
        metric.update(images(2, 0), sample_ids=[0])
    with pytest.raises(ValueError, match="none negative"):
        metric.update(images(1, 0), sample_ids=[-1])
    with pytest.raises(ValueError, match="not finite"):
        metric.add(torch.full((1, 12), float("nan")))
    few = KernelDistance(PIXELS, subset_size=20)
    few.update(images(3, 0))
    with pytest.raises(ValueError, match="at least 20 fake images, got 3"):
        few.compute()


def test_nothing_of_a_metric_is_in_a_checkpoint() -> None:
    owner = nn.Module()
    for name, build in BUILDERS.items():
        owner.add_module(name, build())
    owner.train()
    assert list(owner.state_dict()) == []
    assert list(owner.parameters()) == []
    assert isinstance(owner.kid, FeatureSetMetric)
