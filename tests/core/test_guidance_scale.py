"""One meaning of a guidance scale wherever it can be set: 1 is none, 0 is read as 1 and said so, other values are refused."""

from __future__ import annotations

from typing import Any

import pytest

from sdxs_lightning.objectives.distribution_matching import DistributionMatching
from sdxs_lightning.pairs.target_pairs import PairSettings
from sdxs_lightning.stages.decoder_pairs import SampledLatents

SETTINGS: dict[str, Any] = {
    "distribution_matching.guidance_scale": DistributionMatching,
    "pairs.guidance_scale": PairSettings,
    "sampler.guidance_scale": SampledLatents,
}


@pytest.mark.parametrize("name", SETTINGS)
def test_zero_is_read_as_one_and_said(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert SETTINGS[name](guidance_scale=0.0).guidance_scale == 1.0
    assert capsys.readouterr().err == f"{name} 0 is read as 1: no guidance.\n"
    assert SETTINGS[name](guidance_scale=7.5).guidance_scale == 7.5
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("value", [0.5, -1.0, float("inf"), float("nan"), 101.0])
@pytest.mark.parametrize("name", SETTINGS)
def test_other_values_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value}, but must be a number of at least 1"):
        SETTINGS[name](guidance_scale=value)
