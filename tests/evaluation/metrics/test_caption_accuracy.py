"""Caption accuracy: the arithmetic over attributes and images."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from evaluation.metrics.caption_accuracy import CaptionAccuracy, stated_attributes


class Oracle(nn.Module):
    """A classifier whose answers are given: captions are like "110", one digit per stated attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def right(self, images_uint8: Tensor, captions: Sequence[str]) -> Tensor:
        return torch.tensor([[digit == "1" for digit in caption.ljust(5, "1")] for caption in captions])


def stated(captions: Sequence[str]) -> Tensor:
    return torch.tensor([[column < len(caption) for column in range(5)] for caption in captions])


def test_arithmetic() -> None:
    metric = CaptionAccuracy(Oracle(), stated)
    metric.update(torch.zeros(2, 3, 2, 2, dtype=torch.uint8), ["1111", "11011"])
    metric.update(torch.zeros(0, 3, 2, 2, dtype=torch.uint8), [])
    metric.update(torch.zeros(2, 3, 2, 2, dtype=torch.uint8), ["0000", "11111"])
    accuracy = metric.compute()
    assert float(accuracy["attributes"]) == pytest.approx((4 + 4 + 0 + 5) / (4 + 5 + 4 + 5), abs=1e-15)
    assert float(accuracy["all"]) == pytest.approx(2 / 4, abs=1e-15)


def test_what_the_toy_captions_state() -> None:
    single, pair = "a small red circle on a gray background", "a red circle above a blue square"
    # layout, size, background, colour and shape of both things: a single one states that there is no second,
    # a pair states neither size nor background.
    expected = [[True] * 7, [True, False, False, True, True, True, True]]
    assert stated_attributes([single, pair]).tolist() == expected


def test_classifier_is_in_no_checkpoint() -> None:
    metric = CaptionAccuracy(Oracle(), stated)
    assert list(metric.parameters()) == []
    assert list(metric.state_dict()) == []


def test_refusals() -> None:
    with pytest.raises(ValueError, match="2 images with 1 captions"):
        CaptionAccuracy(Oracle(), stated).update(torch.zeros(2, 3, 2, 2, dtype=torch.uint8), ["1"])
    with pytest.raises(ValueError, match="at least 1 image"):
        CaptionAccuracy(Oracle(), stated).compute()
