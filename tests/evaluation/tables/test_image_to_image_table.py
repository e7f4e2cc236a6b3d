"""Image to image by strength."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from evaluation.benchmarks.tables.__main__ import main
from evaluation.benchmarks.tables.image_to_image import other_prompts
from sdxs_lightning.export import export_pipeline
from sdxs_lightning.families.sd import StableDiffusion
from tests.helpers.tiny_run import ROOT


@pytest.fixture(scope="module")
def student_of_two_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base, folder = str(ROOT / "data" / "toy" / "base"), tmp_path_factory.mktemp("student") / "pipeline"
    family = StableDiffusion(base)
    export_pipeline(family.load_unet(), family, folder, dtype=torch.float32, timesteps=[999, 499])
    return folder


def test_image_to_image_is_scored_by_strength_and_kept(student_of_two_steps: Path, tmp_path: Path) -> None:
    out = tmp_path / "i2i.json"
    arguments = [
        "image_to_image",
        "--student",
        str(student_of_two_steps),
        "--samples",
        "4",
        "--out",
        str(out),
    ]
    main([*arguments, "--strengths", "0.5", "1", "--sheet", str(tmp_path / "sheet.png")])
    first = json.loads(out.read_text())
    assert list(first["rows"]) == [
        "input",
        "strength 0.5",
        "strength 1",
        "no input, 2 steps",
        "no input, 1 step",
    ]
    given, half, full = (row["estimates"] for row in list(first["rows"].values())[:3])
    # The inputs have their own captions' attributes, and the prompts are other captions'.
    assert given["input_agreement"]["value"] == 1.0 > given["prompt_agreement"]["value"]
    assert half["input_agreement"]["value"] > full["input_agreement"]["value"]
    assert Image.open(tmp_path / "sheet.png").size[1] > 5 * 32
    first["rows"]["strength 0.5"]["estimates"]["caption_accuracy"]["value"] = 77.0
    out.write_text(json.dumps(first))
    main([*arguments, "--strengths", "0.5", "1"])
    assert (
        json.loads(out.read_text())["rows"]["strength 0.5"]["estimates"]["caption_accuracy"]["value"] == 77.0
    )


def test_prompts_of_image_to_image_are_of_other_images() -> None:
    assert other_prompts(["a", "b", "c", "d", "e"]) == ["c", "d", "e", "a", "b"]


def test_a_strength_of_nothing_is_refused_before_anything_is_measured(
    student_of_two_steps: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "i2i.json"
    with pytest.raises(SystemExit) as ended:
        main(
            [
                "image_to_image",
                "--student",
                str(student_of_two_steps),
                "--strengths",
                "1",
                "0",
                "--out",
                str(out),
            ]
        )
    assert ended.value.code == 2 and "strength" in capsys.readouterr().err and not out.exists()
