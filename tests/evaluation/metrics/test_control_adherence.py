"""Control adherence: F1 of edges and depth error by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.conditions import Canny
from evaluation.metrics.control_adherence import DepthAdherence, EdgeAdherence


def itself(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A condition that is the image itself."""
    return image


def lines(*columns: int, size: int = 8) -> Tensor:
    image = torch.zeros(1, 3, size, size, dtype=torch.uint8)
    image[..., list(columns)] = 255
    return image


def score(metric: EdgeAdherence | DepthAdherence, made: Tensor, asked: Tensor) -> float:
    metric.update_with(made, asked)
    return float(metric.compute())


def test_f1_of_edges() -> None:
    assert score(EdgeAdherence(itself), lines(2, 5), lines(2, 5)) == 1
    assert score(EdgeAdherence(itself), lines(2, 5), lines(2)) == pytest.approx(
        2 / 3
    )  # precision 1/2, recall 1
    assert score(EdgeAdherence(itself), lines(3), lines(2)) == 0
    assert score(EdgeAdherence(itself, tolerance_px=1), lines(3), lines(2)) == 1
    assert score(EdgeAdherence(itself), lines(), lines()) == 1
    assert score(EdgeAdherence(itself), lines(), lines(1)) == 0


def test_the_picture_that_the_edges_are_from_follows_them() -> None:
    made = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    made[:, :, 16:48, 20:40] = 200
    condition = Canny()
    edges = np.stack([condition(image) for image in made.permute(0, 2, 3, 1).numpy()])
    control = torch.from_numpy(edges).permute(0, 3, 1, 2)
    assert int((control > 0).sum()) > 0
    metric = EdgeAdherence(condition)
    metric.update_with(made, control, [0, 1])
    metric.update_with(made.roll(7, dims=-1), control, [2, 3])
    found = metric.estimates()["edge_f1"]
    assert found.samples == 4
    assert metric.rows_of("fake")[0].flatten()[:2].tolist() == [1, 1]
    assert metric.rows_of("fake")[0].flatten()[2] < 0.7


def test_depth_error_is_the_root_mean_square_in_grey_levels() -> None:
    made = torch.full((1, 3, 8, 8), 100, dtype=torch.uint8)
    asked = made.clone()
    asked[..., :4] = 130
    assert score(DepthAdherence(itself), made, asked) == pytest.approx((900 / 2) ** 0.5)


def test_refusals() -> None:
    with pytest.raises(
        ValueError, match=r"edge_f1 of images \(1, 3, 8, 8\) with control images \(1, 3, 4, 4\)"
    ):
        EdgeAdherence(itself).update_with(lines(1), lines(1, size=4))
    with pytest.raises(ValueError, match="edge_f1 needs control images; use update_with"):
        EdgeAdherence(itself).update(lines(1), ["a line"])
