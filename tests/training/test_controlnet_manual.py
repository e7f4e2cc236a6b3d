"""The walk-through of the ControlNet manual, command by command, at tiny size."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data.prepare.__main__ import main as prepare
from data.toy.background_bar import BackgroundBar
from data.toy.world import captions, image_at
from evaluation.evaluate import main as evaluate
from sdxs_lightning.cli import main as train
from tests.helpers.tiny_run import ROOT

MANUAL = ROOT / "sdxs_lightning" / "stages" / "controlnet" / "README.md"
BLOCK = re.compile(r"^```(\w+)(?: file=(\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PHOTOS = 6
SMALL = {
    "data.prepare images": ["--processes", "1"],
    "data.prepare latents": ["--processes", "1", "--device", "cpu"],
    "control_reader": ["--trainer.max_steps=2", "--model.widths=[4,4]"],
    "controlnet_joint": [
        '--model.update_schedule={"warmup_updates": 1, "max_student_updates": 2, "fake_score_only_iterations": 0, '
        '"fake_score_updates_per_student_update": 1}',
    ],
    "evaluation.evaluate": ["--batch_size", "3", "--device", "cpu", "--conditioning_scales", "1"],
}
TRAINING = ["--data.batch_size=2"]


def commands(text: str) -> list[list[str]]:
    joined = text.replace("\\\n", " ")
    return [shlex.split(line) for line in joined.splitlines() if line.strip()]


def test_the_walk_through_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("data", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    for folder in ("photos", "conditions"):
        (tmp_path / folder).mkdir()
    for i, caption in enumerate(captions("val", PHOTOS)):
        Image.fromarray(image_at("val", i)).save(f"photos/{i}.png")
        Path(f"photos/{i}.txt").write_text(caption)
        Image.fromarray(BackgroundBar()(image_at("val", i))).save(f"conditions/{i}.png")

    names: dict[str, Any] = {}
    blocks = [(language, file, text) for language, file, text in BLOCK.findall(MANUAL.read_text())]
    for language, file, text in sorted(blocks, key=lambda block: block[0] != "yaml"):  # files come first
        if file:
            Path(file).write_text(text)
        elif language == "bash":
            for command in commands(text):
                run(command)
        elif language == "python":
            exec(text, names)
    assert names["image"].size == (32, 32)
    assert Path("control.json").is_file() and Path("control.png").is_file()
    settings: dict[str, Any] = {"height": 32, "width": 32, "num_inference_steps": 1, "guidance_scale": 0}

    def drawn(pipeline: Any, **more: Any) -> Any:
        generator = torch.Generator().manual_seed(0)
        prompt = "a red circle above a blue square"
        image = pipeline(prompt, **settings, **more, generator=generator).images[0]
        return np.asarray(image).astype(int)

    condition = Image.open("conditions/0.png").convert("RGB")
    before, pipeline = drawn(names["student"]), names["pipeline"]
    assert np.abs(drawn(pipeline, image=condition) - np.asarray(names["image"])).max() == 0
    with torch.no_grad():
        for parameter in pipeline.controlnet.controlnet_mid_block.parameters():
            parameter.add_(1.0)
    assert np.abs(drawn(pipeline, image=condition, controlnet_conditioning_scale=0.0) - before).max() == 0
    assert np.abs(drawn(pipeline, image=condition) - before).max() > 20


def run(command: list[str]) -> None:
    assert command[0] == "python"
    line = " ".join(command)
    extra = next(flags for name, flags in SMALL.items() if name in line)
    if command[1] == "train.py":
        assert train([*command[2:], *TRAINING, *extra]) == 0
    else:
        assert command[1] == "-m"
        {"data.prepare": prepare, "evaluation.evaluate": evaluate}[command[2]]([*command[3:], *extra])
