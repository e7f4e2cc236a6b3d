"""The command `evaluate` on a protocol of every number that a tiny CLIP can measure, and images for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evaluation.evaluate import main
from evaluation.protocols.image_protocol import ImageProtocol, Measurement
from evaluation.protocols.protocols import IMAGE_PROTOCOLS, PROTOCOLS
from tests.helpers.evaluated_images import (
    COUNT,
    Refused,
    Run,
    write_images,
)
from tests.helpers.refusals import refusal


@pytest.fixture
def options(world: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A protocol of every number that the tests' CLIP can measure."""
    measurements = (
        Measurement("fid", "clip_image:vit-b-32"),
        Measurement("clip_score", "clip_text:vit-b-32"),
    )
    monkeypatch.setitem(IMAGE_PROTOCOLS, "any", ImageProtocol("any", measurements))
    for command in ("evaluate", "reference"):
        monkeypatch.setattr(f"evaluation.{command}.PROTOCOL_NAMES", (*PROTOCOLS, *IMAGE_PROTOCOLS))
    clip = world / "clip"
    return ["--protocol", "any", "--device", "cpu", "--processes", "1", "--batch_size", "5",
            "--weights", f"clip_image={clip}", f"clip_text={clip}", f"clip_unit={clip}"]  # fmt: skip


@pytest.fixture
def run(options: list[str], tmp_path: Path) -> Run:
    """The command in this process, always with the same --out; its result."""

    def run(*arguments: object, out: str = "out.json") -> dict[str, Any]:
        main([*map(str, arguments), *options, "--out", str(tmp_path / out)])
        result: dict[str, Any] = json.loads((tmp_path / out).read_text())
        return result

    return run


@pytest.fixture
def refused(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """What the command says when it refuses; nothing has been measured then."""

    def refused(*arguments: object) -> str:
        said = refusal(main, [*arguments, *options, "--out", tmp_path / "refused.json"], capsys)
        assert not list((tmp_path / "refused.work").glob("*/batch_*.npz"))
        return said

    return refused


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images", [f"{i}.png" for i in range(COUNT)])


@pytest.fixture
def real(tmp_path: Path) -> Path:
    return write_images(tmp_path / "real", [f"{i:02d}.png" for i in range(20)], seed=1)
