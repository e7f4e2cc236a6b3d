"""The shape score: real objects fit their masks, and fit worse the more they are damaged."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from data.toy.shape_fit import best_similarity, coverage, nearest_background, shape_similarities
from data.toy.world import BACKGROUNDS, COLOURS, captions, image_at, parse_caption, scene_at, shape_mask
from evaluation.metrics.shape_score import CLEAN, ShapeScore

COUNT = 40
CAPTIONS = captions("val", COUNT)


def images() -> Tensor:
    return torch.stack([torch.from_numpy(image_at("val", i)).permute(2, 0, 1) for i in range(COUNT)])


@pytest.fixture(scope="module")
def real() -> Tensor:
    return images()


def score(found: Tensor, texts: list[str] = CAPTIONS) -> float:
    return float(shape_similarities(found, texts).mean())


def test_real_images_fit_their_masks(real: Tensor) -> None:
    found = shape_similarities(real, CAPTIONS)
    assert found.shape == (COUNT, 2)
    assert float(found.mean()) > 0.93 and float((found.amin(dim=1) >= CLEAN).float().mean()) > 0.95
    single = torch.tensor([parse_caption(text).second is None for text in CAPTIONS])
    assert torch.equal(found[single, 0], found[single, 1])


@pytest.mark.parametrize(
    "damage",
    [
        lambda x: torch.where(
            torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) < 0.3, 255 - x, x
        ),
        lambda x: x.roll(4, dims=1),  # colours of other channels' rows
        lambda x: x[:, [2, 0, 1]],
        lambda x: torch.cat([x[..., :16].flip(-2), x[..., 16:]], dim=-1),
    ],
    ids=["noise", "shift of rows", "colours exchanged", "half upside down"],
)
def test_damage_lowers_the_score(real: Tensor, damage: Callable[[Tensor], Tensor]) -> None:
    assert score(damage(real)) < score(real) - 0.01


def test_another_shape_fits_worse(real: Tensor) -> None:
    """The same object measured against every shape: its own wins."""
    for index in range(12):
        scene = scene_at("val", index)
        if scene.second is not None:
            continue
        background = torch.tensor(BACKGROUNDS[scene.background or "gray"]).float()
        share = coverage(real[index].float(), background, torch.tensor(COLOURS[scene.first.colour]).float())
        fits = {
            shape: best_similarity(share, shape, scene.size)
            for shape in ("circle", "square", "cross", "heart")
        }
        fits[scene.first.shape] = best_similarity(share, scene.first.shape, scene.size)
        assert max(fits, key=lambda shape: fits[shape]) == scene.first.shape, scene


def test_a_mask_of_the_renderer_is_its_own_best_fit() -> None:
    y, x = np.mgrid[0:64, 0:64].astype(np.float32) / 2 + 0.25
    mask = shape_mask("heart", x, y, np.array([13.5, 18.0], dtype=np.float32), 9.05, 0.13)
    share = torch.from_numpy(mask.astype(np.float32).reshape(32, 2, 32, 2).mean(axis=(1, 3)))
    assert best_similarity(share, "heart", "large") == pytest.approx(1.0, abs=1e-5)
    assert best_similarity(torch.zeros(32, 32), "heart", "large") == 0.0


def test_the_background_of_a_pair_is_found(real: Tensor) -> None:
    pairs = [i for i in range(COUNT) if scene_at("val", i).second is not None]
    found = [nearest_background(real[i].float()) for i in pairs]
    right = [name == scene_at("val", i).background for i, name in zip(pairs, found, strict=True)]
    assert sum(right) >= len(right) - 1


def test_estimates_hold_mean_and_share_with_intervals(real: Tensor) -> None:
    metric = ShapeScore()
    metric.update(real, CAPTIONS)
    rows = shape_similarities(real, CAPTIONS)
    found = metric.estimates()
    assert found["shape_score"].value == pytest.approx(float(rows.mean()), abs=1e-6)
    assert found["clean_images"].value == pytest.approx(float((rows.amin(1) >= CLEAN).float().mean()))
    for estimate in found.values():
        assert estimate.low is not None and estimate.high is not None and estimate.low < estimate.value
    assert {name: float(value) for name, value in metric.compute().items()} == pytest.approx(
        {name: estimate.value for name, estimate in found.items()}
    )
    with pytest.raises(ValueError, match="needs the captions"):
        ShapeScore().update(real)
