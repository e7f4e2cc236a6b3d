"""Quality by guidance scale, and what negative prompts remove."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from data.toy.rendered import render_captions
from data.toy.training.classifier import AttributeClassifier
from data.toy.world import BACKGROUNDS, captions, parse_caption
from evaluation.benchmarks.tables.__main__ import main
from evaluation.benchmarks.tables.guidance import removed
from sdxs_lightning.export import export_pipeline
from sdxs_lightning.families.sd import StableDiffusion
from sdxs_lightning.networks.guidance_input import GuidanceInput, add_guidance_input, record_learnt
from tests.helpers.tiny_run import ROOT

BASE = str(ROOT / "data" / "toy" / "base")


class Rendered:
    """The world's own images; with a negative prompt, of the next background where `follows` is True."""

    def __init__(self, follows: bool) -> None:
        self.follows = follows
        self.given: list[tuple[str, str]] = []

    def __call__(self, texts: list[str], ids: Tensor, negative: list[str] | None = None) -> Tensor:
        images: Tensor = render_captions(texts, ids)
        if negative is None:
            return images
        self.given += list(zip(texts, negative, strict=True))
        if not self.follows:
            return images
        # A picture in a single colour that is not the negative prompt's background.
        colours = list(BACKGROUNDS.values())
        backgrounds = [list(BACKGROUNDS).index(str(parse_caption(one).background)) for one in negative]
        wanted = torch.tensor(
            [colours[(index + 1) % len(colours)] for index in backgrounds], dtype=torch.uint8
        )
        return wanted[:, :, None, None].expand(-1, -1, 32, 32)


def test_removed_is_the_share_of_images_with_another_background() -> None:
    classifier = AttributeClassifier.from_pretrained(ROOT / "data" / "toy" / "classifier")
    prompts = captions("test", 60)
    for follows, share in ((True, 1.0), (False, 0.0)):
        maker: Any = Rendered(follows)
        found = removed(maker, prompts, classifier, 16)
        pairs = [one for one in prompts if parse_caption(one).background is None]
        assert (found["removed"], found["samples"]) == (share, len(pairs)) and len(pairs) > 20
        assert (found["caption_accuracy"] > 0.9) != follows
        assert [text for text, _ in maker.given] == pairs
        # Each negative prompt states the background that the image had.
        assert all(parse_caption(negative).background is not None for _, negative in maker.given)
    with pytest.raises(ValueError, match="no caption states the background"):
        removed(maker, pairs, classifier, 16)


def test_the_table_is_written_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    family = StableDiffusion(BASE)
    unet = family.load_unet()
    add_guidance_input(unet, 16)
    student = export_pipeline(unet, family, tmp_path / "student", dtype=torch.float32)
    out = tmp_path / "guidance.json"
    given = [
        "guidance",
        "--student",
        str(student),
        "--samples",
        "40",
        "--out",
        str(out),
        "--scales",
        "1",
        "3",
    ]
    main([*given, "--sheet", str(tmp_path / "sheet.png")])
    first = json.loads(out.read_text())["rows"]
    assert list(first) == [
        "guidance 1",
        "guidance 1, negative prompt",
        "guidance 3",
        "guidance 3, negative prompt",
    ]
    # The new input changes nothing yet, so that the scales agree, and the shifted prompt does.
    assert first["guidance 1"] == first["guidance 3"] and first["guidance 1"]["diversity"] > 0
    assert 0 < first["guidance 1, negative prompt"]["removed"] < 1
    assert Image.open(tmp_path / "sheet.png").size[1] > 4 * 32
    changed = json.loads(out.read_text())
    changed["rows"]["guidance 3"]["fid"] = 77.0
    out.write_text(json.dumps(changed))
    main(given)
    assert json.loads(out.read_text())["rows"]["guidance 3"]["fid"] == 77.0
    assert "removed by the negative prompt, %" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["guidance", "--student", BASE, "--samples", "40", "--out", str(out)])
    assert "does not take the guidance scale as an input" in capsys.readouterr().err


def test_a_student_is_measured_at_what_it_learnt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    family = StableDiffusion(BASE)
    unet = family.load_unet()
    add_guidance_input(unet, 16)
    record_learnt(unet, GuidanceInput(low=1.0, high=2.0))
    student = export_pipeline(unet, family, tmp_path / "student", dtype=torch.float32)
    out = tmp_path / "guidance.json"
    line = ["guidance", "--student", str(student), "--samples", "12", "--diversity_prompts", "2"]
    line += ["--out", str(out), "--scales"]
    with pytest.raises(SystemExit):
        main([*line, "1", "3"])
    assert "--scales is 3, but the student learnt scales from 1 to 2" in capsys.readouterr().err
    main([*line, "2", "--sheet", str(tmp_path / "sheet.png")])
    assert list(json.loads(out.read_text())["rows"]) == ["guidance 2"]  # and no negative prompts
    assert (tmp_path / "sheet.png").is_file()
