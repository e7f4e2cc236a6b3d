"""The generator with students that take the guidance scale and negative prompts as inputs, against stock diffusers."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from torch import Tensor

from evaluation.images.samples import ModelSamples, load_pipeline
from sdxs_lightning.core.errors import UserError
from sdxs_lightning.demo.__main__ import DemoOptions
from sdxs_lightning.demo.serve import studio
from sdxs_lightning.families.folders import read_json
from sdxs_lightning.generate import main
from sdxs_lightning.inference.exporting.export import export_runtime
from sdxs_lightning.inference.generator import OneStepGenerator
from sdxs_lightning.inference.negative_prompts import negative_prompt_inputs
from sdxs_lightning.networks.controlnet import load_controlnet
from sdxs_lightning.networks.guidance_input import (
    GuidanceInput,
    check_negative_prompts_are_learnt,
    check_scale_is_learnt,
    record_learnt,
)
from tests.helpers.refusals import refusal
from tests.helpers.students import PROMPTS, SEEDS, condition

Students = Callable[[str], Path]
NEGATIVE = ["blurry", ""]


def stock(folder: Path, scale: float, negative: list[str] | None = None, **given: Any) -> Tensor:
    """(2, 3, H, W) in [0, 1], by diffusers' own pipeline."""
    pipeline: Any = load_pipeline(str(folder))
    texts: dict[str, Any] = {"prompt": PROMPTS}
    if negative is not None:
        texts = negative_prompt_inputs(pipeline, PROMPTS, negative)
    if "image" in given:
        name = type(pipeline).__name__.replace("Pipeline", "ControlNetPipeline")
        controlnet = load_controlnet(Path(f"{folder}-controlnet"))
        pipeline = getattr(diffusers, name)(**pipeline.components, controlnet=controlnet)
    pipeline.set_progress_bar_config(disable=True)
    images: Tensor = pipeline(
        **texts,
        guidance_scale=scale,
        num_inference_steps=4 if "4" in folder.name else 1,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        output_type="pt",
        **given,
    ).images
    return images.float()


def pixels(folder: Path, scale: float, **given: Any) -> Tensor:
    controlnet = f"{folder}-controlnet" if "control_images" in given else None
    generator = OneStepGenerator.load(folder, controlnet=controlnet, device="cpu")
    return (generator.sample(PROMPTS, SEEDS, guidance_scale=scale, **given).float() / 2 + 0.5).clamp(0, 1)


def largest(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd-midless", "sd-4-steps"])
def test_equals_the_stock_pipeline_at_every_scale(name: str, guided: Students) -> None:
    folder = guided(name)
    images = {scale: pixels(folder, scale) for scale in (1.0, 3.0)}
    for scale, found in images.items():
        assert largest(found, stock(folder, scale)) <= 1e-5
    assert largest(images[1.0], images[3.0]) > 0.01
    assert torch.equal(pixels(folder, 0.0), images[1.0])  # 0 is read as no guidance, as everywhere


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_negative_prompts_are_those_of_training(name: str, guided: Students) -> None:
    folder = guided(name)
    found = pixels(folder, 2.0, negative_prompts=NEGATIVE)
    assert largest(found, stock(folder, 2.0, NEGATIVE)) <= 1e-5
    without = pixels(folder, 2.0)
    assert largest(found[:1], without[:1]) > 0.01
    assert largest(found[1:], without[1:]) == 0  # an empty one changes nothing
    assert torch.equal(pixels(folder, 2.0, negative_prompts="blurry")[:1], found[:1])


def test_the_empty_prompt_of_sdxl_is_zeros_unless_the_folder_encodes_it(
    guided: Students, tmp_path: Path
) -> None:
    folder = tmp_path / "sdxl"
    shutil.copytree(guided("sdxl"), folder)
    zeros = pixels(folder, 2.0, negative_prompts=NEGATIVE)
    index = read_json(folder / "model_index.json")
    assert index["force_zeros_for_empty_prompt"] is True
    index["force_zeros_for_empty_prompt"] = False
    (folder / "model_index.json").write_text(json.dumps(index))
    encoded = pixels(folder, 2.0, negative_prompts=NEGATIVE)
    assert largest(encoded, stock(folder, 2.0, NEGATIVE)) <= 1e-5
    assert largest(encoded[:1], zeros[:1]) > 0.01 and largest(encoded[1:], zeros[1:]) == 0


def test_a_controlnet_gets_the_prompts_without_negative_ones(guided: Students) -> None:
    folder, images = guided("sd"), condition(2, (32, 32))
    found = pixels(folder, 2.0, control_images=images)
    assert largest(found, stock(folder, 2.0, image=images.float() / 255)) <= 1e-5
    generator = OneStepGenerator.load(folder, controlnet=f"{folder}-controlnet", device="cpu")
    seen = []
    controlnet = generator.networks.parts["controlnet"]  # type: ignore[attr-defined]
    controlnet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["encoder_hidden_states"]), with_kwargs=True
    )
    generator.generate(PROMPTS, SEEDS, images, guidance_scale=2.0)
    generator.generate(PROMPTS, SEEDS, images, guidance_scale=2.0, negative_prompts="blurry")
    assert len(seen) == 2 and torch.equal(seen[0], seen[1])


def test_the_command_takes_both(guided: Students, tmp_path: Path) -> None:
    folder, out = guided("sd"), tmp_path / "one.png"
    line = ["--model", str(folder), "--prompt", PROMPTS[0], "--seed", str(SEEDS[0]), "--device", "cpu"]
    main([*line, "--guidance_scale", "3", "--negative_prompt", "blurry", "--out", str(out)])
    generator = OneStepGenerator.load(folder, device="cpu")
    expected = generator.generate(PROMPTS[0], SEEDS[0], guidance_scale=3.0, negative_prompts="blurry")
    found = torch.from_numpy(np.asarray(Image.open(out)).copy()).permute(2, 0, 1)
    assert int((found.int() - expected[0].int()).abs().max()) <= 1


def test_the_command_reads_the_scale_once_and_names_its_own_options(
    guided: Students, student: Students, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["--device", "cpu", "--batch_size", "1", "--prompt", *PROMPTS, "--out", str(tmp_path / "images")]
    main(["--model", str(guided("sd")), "--guidance_scale", "0", *line])
    assert capsys.readouterr().err.count("--guidance_scale 0 is read as 1: no guidance.") == 1
    for scale in ("0.5", "nan", "-1", "inf"):
        assert "--guidance_scale" in refusal(
            main, ["--model", "none", "--guidance_scale", scale, *line], capsys
        )
    said = refusal(main, ["--model", str(student("sd")), "--negative_prompt", "blurry", *line], capsys)
    assert "generate: --negative_prompt is 'blurry', but the student in" in said
    said = refusal(main, ["--model", str(guided("sd")), "--negative_prompt", "blurry", *line], capsys)
    assert "takes the guidance scale as an input: give --guidance_scale, a number" in said


def test_what_does_not_fit_is_refused(guided: Students, student: Students, tmp_path: Path) -> None:
    generator = OneStepGenerator.load(guided("sd"), device="cpu")
    with pytest.raises(
        UserError, match="takes the guidance scale as an input: give `guidance_scale`, a number"
    ):
        generator.generate(PROMPTS)
    for wrong in (0.5, -1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match="`guidance_scale` is .* but must be a number of at least 1"):
            generator.generate(PROMPTS, guidance_scale=wrong)
    for several in ("2", [2.0, 3.0], torch.tensor(2.0)):
        with pytest.raises(UserError, match="`guidance_scale` is .* but must be one number of at least 1"):
            generator.generate(PROMPTS, guidance_scale=several)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"`negative_prompts`\[1\] is a NoneType, expected text"):
        generator.generate(PROMPTS, guidance_scale=2.0, negative_prompts=["a", None])  # type: ignore[list-item]
    with pytest.raises(UserError, match=r"`negative_prompts`\[0\] is a int, expected text"):
        generator.generate(PROMPTS, guidance_scale=2.0, negative_prompts=3)  # type: ignore[arg-type]
    with pytest.raises(
        UserError, match="3 negative prompts for 2 prompts; give one for all, or one for each"
    ):
        generator.generate(PROMPTS, guidance_scale=2.0, negative_prompts=["a", "b", "c"])
    plain = OneStepGenerator.load(student("sd"), device="cpu")
    with pytest.raises(
        UserError, match="`guidance_scale` is 2.0, but the student in .* leave it out, or train"
    ):
        plain.generate(PROMPTS, guidance_scale=2.0)
    with pytest.raises(UserError, match="`negative_prompts` is 'blurry', but the student in .* takes none"):
        plain.generate(PROMPTS, negative_prompts="blurry")
    with pytest.raises(
        UserError, match="takes the guidance scale as an input, which the demo does not give; see"
    ):
        studio(DemoOptions(model=str(guided("sd"))))
    with pytest.raises(
        UserError, match="which is not given here: run it by `python -m sdxs_lightning.generate"
    ):
        export_runtime(guided("sd"), tmp_path / "out", "onnx", "fp32")


@pytest.mark.parametrize(
    "record",
    [
        {},
        "1 to 4.5",
        {"low": 1.0, "high": "4.5", "negative_prompts": True},
        {"low": True, "high": 4.5, "negative_prompts": True},
        {"low": 1.0, "high": 4.5},
    ],
)
def test_a_record_that_is_none_is_named(record: object) -> None:
    config = {"_student_guidance": record}
    message = re.escape(
        f"config.json has _student_guidance {record!r}, which is {{low, high, negative_prompts}}"
    )
    with pytest.raises(UserError, match=message):
        check_scale_is_learnt(config, 2.0, "scale")
    with pytest.raises(UserError, match=message):
        check_negative_prompts_are_learnt(config, ["red"])


def test_what_the_student_did_not_learn_is_refused(
    guided: Students, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "sd"
    shutil.copytree(guided("sd"), folder)
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    record_learnt(unet, GuidanceInput(low=1.5, high=4.5))
    unet.save_pretrained(folder / "unet")
    generator = OneStepGenerator.load(folder, device="cpu")
    learnt = "but the student learnt scales from 1.5 to 4.5 (student.guidance)"
    for scale in (1.0, 4.6):
        with pytest.raises(UserError, match=rf"`guidance_scale` is {scale:g}, {re.escape(learnt)}"):
            generator.generate(PROMPTS, guidance_scale=scale)
    with pytest.raises(
        UserError, match=r"give `guidance_scale`, a number from 1.5 to 4.5 \(student.guidance"
    ):
        generator.generate(PROMPTS)
    with pytest.raises(UserError, match="the student learnt no negative prompts .*, got 'blurry': leave"):
        generator.generate(PROMPTS, guidance_scale=2.0, negative_prompts=["", "blurry"])
    given: dict[str, Any] = {"guidance_scale": 4.5, "negative_prompts": ""}
    assert torch.equal(
        generator.generate(PROMPTS, SEEDS, **given),
        OneStepGenerator.load(guided("sd"), device="cpu").generate(PROMPTS, SEEDS, **given),
    )
    line = [
        "--model",
        str(folder),
        "--guidance_scale",
        "7",
        "--prompt",
        "x",
        "--out",
        str(tmp_path / "x.png"),
    ]
    assert f"--guidance_scale is 7, {learnt}" in refusal(main, [*line, "--device", "cpu"], capsys)
    with pytest.raises(UserError, match=re.escape(f"--guidance_scale is 1, {learnt}")):
        ModelSamples(str(folder), tuple(PROMPTS)).maker(torch.device("cpu"))
