"""python -m sdxs_lightning.generate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sdxs_lightning.generate import main
from sdxs_lightning.inference.generator import OneStepGenerator
from tests.helpers.students import PROMPTS, condition

Students = Callable[[str], Path]
TOY_BASE = str(Path(__file__).parents[2] / "data" / "toy" / "base")


def read(file: Path) -> torch.Tensor:
    return torch.from_numpy(np.asarray(Image.open(file)).copy()).permute(2, 0, 1)


def test_writes_the_generators_images(
    student: Students, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(student("sd-midless"))
    line = [
        "--model",
        model,
        "--prompt",
        *PROMPTS,
        "--images_per_prompt",
        "2",
        "--seed",
        "5",
        "--batch_size",
        "3",
    ]
    main([*line, "--out", str(tmp_path / "images"), "--size", "24x40", "--device", "cpu"])
    assert "4 image(s)" in capsys.readouterr().out
    generator = OneStepGenerator.load(model, device="cpu")
    expected = generator.generate([PROMPTS[0]] * 2 + [PROMPTS[1]] * 2, 5, size=(24, 40))
    found = torch.stack([read(tmp_path / "images" / f"{i:05d}.png") for i in range(4)])
    assert found.shape == (4, 3, 24, 40)
    assert int((found.int() - expected.int()).abs().max()) <= 1


def test_control_and_image(student: Students, tmp_path: Path) -> None:
    model = student("sd")
    edges = condition(1, (32, 32))
    Image.fromarray(edges[0].permute(1, 2, 0).numpy()).save(tmp_path / "edges.png")
    line = ["--model", str(model), "--prompt", PROMPTS[0], "--device", "cpu", "--out"]
    control = ["--controlnet", f"{model}-controlnet", "--control_image", str(tmp_path / "edges.png")]
    main([*line, str(tmp_path / "one.png"), *control, "--control_scale", "0.5"])
    generator = OneStepGenerator.load(model, controlnet=f"{model}-controlnet", device="cpu")
    assert torch.equal(
        read(tmp_path / "one.png"), generator.generate(PROMPTS[0], 0, edges, control_scale=0.5)[0]
    )
    expected = generator.generate(PROMPTS[0], 0, image=edges, strength=0.5)[0]
    # A photo lies on its side in the file (EXIF), and a wider one keeps its shape: its middle is taken.
    upright = Image.open(tmp_path / "edges.png")
    wider = Image.new("RGB", (64, 32), "red")
    wider.paste(upright, (16, 0))
    wider.save(tmp_path / "wider.png")
    lying = Image.Exif()
    lying[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "lying.png", exif=lying)
    for name in ("edges", "wider", "lying"):
        given = ["--image", str(tmp_path / f"{name}.png"), "--strength", "0.5"]
        main([*line, str(tmp_path / "two.png"), *given])
        assert torch.equal(read(tmp_path / "two.png"), expected), name
    with Image.open(tmp_path / "lying.png") as photo:
        assert torch.equal(generator.generate(PROMPTS[0], 0, image=photo, strength=0.5)[0], expected)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--image", "a.png"], "--image and --strength belong together"),
        (["--images_per_prompt", "2"], "one file, for 2 images; give a folder"),
        (
            ["--out", "one.jpg"],
            "--out is 'one.jpg', and images are written as .png; give such a file, or a folder",
        ),
        (["--size", "12x"], "--size is '12x', but must be a side in pixels"),
        (["--size", "\u00b2"], "--size is '\u00b2', but must be a side in pixels"),
        (["--prompt", "a \udcff"], "--prompt[0] is 'a \\udcff', which is no text in UTF-8"),
        (["--size", "30"], "--size is 30x30, but height and width must be multiples of 8"),
        (["--image", "missing.png", "--strength", "0.5"], "--image 'missing.png' cannot be read as an image"),
        (["--model", "nowhere"], "there is no model in 'nowhere'"),
        (["--size", "1000000x1000000"], "a side is at most 16384 px"),
        (["--seed", "99999999999999999999999"], "--seed is '99999999999999999999999', but must be"),
        (
            ["--controlnet", "c"],
            "--controlnet and --control_image belong together, and --control_image is missing",
        ),
        (["--control_image", "c.png"], "belong together, and --controlnet is missing"),
        (["--control_scale", "2"], "--control_scale is 2, and there is no --control_image"),
        (["--lora_scale", "0.5"], "--lora_scale is 0.5, and there is no --lora"),
        (
            ["--lora_scale", "1e9", "--lora", "x"],
            "--lora_scale is '1000000000.0', but must be a number from -100",
        ),
        (
            ["--model", TOY_BASE],
            f"'{TOY_BASE}' is a base of many steps by its scheduler: it has a DDIMScheduler whose",
        ),
        (["--steps", "4"], "is a student of one step, got --steps 4"),
        (["--lora", "nowhere"], "--lora: there is no file or folder 'nowhere'"),
        (["--backend", "onnx"], "is a diffusers folder, which --backend torch runs"),
        (["--device", "tpu9"], "--device is 'tpu9', but must be auto, cpu, cuda"),
        (
            ["--images_per_prompt", "2147483647", "--out", "never"],
            "2,147,483,647 images of at least 4.1 kB each need 8.8 TB, and '",
        ),
    ],
)
def test_messages(
    line: list[str], message: str, student: Students, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = [] if "--prompt" in line else ["--prompt", "a"]
    usual = ["--model", str(student("sd")), *prompt, "--out", "one.png"]
    with pytest.raises(SystemExit) as stop:
        main([*usual, *line])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_broken_image_is_an_error(
    student: Students, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OneStepGenerator, "sample", lambda *_, **__: torch.full((1, 3, 32, 32), torch.nan))
    with pytest.raises(SystemExit) as stop:
        main(["--model", str(student("sd")), "--prompt", "a", "--out", str(tmp_path / "one.png")])
    assert stop.value.code == 2 and "1 of 1 images have NaN or infinity" in capsys.readouterr().err
    assert not (tmp_path / "one.png").exists()
