"""The error of the score difference in bfloat16, on the toy base with a fake score that lags behind."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from evaluation.benchmarks import score_precision
from evaluation.benchmarks.score_precision import VARIANTS, ScorePrecisionOptions, main, run
from tests.helpers.refusals import refusal

BASE = "data/toy/base"


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ScorePrecisionOptions:
    unet = UNet2DConditionModel.from_pretrained(BASE, subfolder="unet", torch_dtype=torch.float32)
    torch.manual_seed(0)
    for parameter in unet.parameters():
        parameter.data += 0.02 * parameter.std() * torch.randn_like(parameter)
    unet.save_pretrained(tmp_path / "fake")
    monkeypatch.setattr(score_precision, "TIMESTEPS", (400, 980))
    return ScorePrecisionOptions(
        student=BASE,
        fake_score=str(tmp_path / "fake"),
        conditioning_timestep=699,
        guidance_scale=1.0,
        samples=2,
        out=tmp_path / "precision.json",
    )


def test_only_what_a_variant_names_is_rounded(
    options: ScorePrecisionOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With networks kept in float32 the prompts' rounding alone is left."""
    asked: list[bool] = []

    def exact(bf16: bool) -> nullcontext[None]:
        asked.append(bf16)
        return nullcontext()

    monkeypatch.setattr(score_precision, "_precision", exact)
    shown = run(options)
    assert options.out is not None
    rows = json.loads(options.out.read_text())["relative_error"]
    assert list(rows) == list(VARIANTS) and all(name in shown for name in VARIANTS)
    real, both, prompts = rows.values()
    assert set(real.values()) == set(both.values()) == {0.0}
    # Rounded for both scores, which are close, it nearly cancels: for one alone the error is 3e-3.
    assert all(0 < error < 1e-3 for error in prompts.values())
    assert asked == [False, True, True] * 2


def test_the_error_is_that_of_bfloat16(options: ScorePrecisionOptions) -> None:
    real, both, _ = score_precision.measure(options).values()
    assert all(1e-4 < error < 1 for row in (real, both) for error in row.values())
    assert real != both


def test_a_place_that_cannot_be_written_and_a_scale_that_is_none_are_refused(
    options: ScorePrecisionOptions, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["--student", BASE, "--fake_score", options.fake_score]
    assert (
        refusal(main, [*line, "--out", tmp_path], capsys)
        == f"score_precision: '{tmp_path}' is a folder; give a file."
    )
    assert "guidance_scale" in refusal(main, [*line, "--guidance_scale", "nan"], capsys)
