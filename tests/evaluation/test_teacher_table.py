"""The commands that measure references and teachers, and the protocols that their numbers stand under."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from data.toy.training.classifier import AttributeClassifier
from evaluation import reference
from evaluation.benchmarks import teacher_table
from evaluation.metrics.frechet import FeatureStatistics
from evaluation.protocols.protocols import PROTOCOLS, get_protocol, hash_weights


def run(world: Path, out: Path, *more: str) -> dict[str, dict[str, object]]:
    """The command on the tiny base; what it stored."""
    base = str(world / "sd-epsilon")
    teacher_table.main(["--base", base, "--out", str(out), "--protocol", "toy", "--batch_size", "4", *more])
    stored: dict[str, dict[str, object]] = json.loads(out.read_text())
    return stored


def test_table_measures_each_thing_once(
    world: Path, toy_networks: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results" / "teacher.json"
    first = run(world, out, "--steps", "2", "1")["toy"]
    assert list(first["teacher"]) == ["2", "1"]  # type: ignore[call-overload]
    assert set(first["teacher"]["2"]) == {  # type: ignore[index]
        "nfe", "fid", "clip_score", "caption_accuracy", "attribute_accuracy", "ms_per_image",
    }  # fmt: skip
    assert first["latency_ratio"]["2"] > first["latency_ratio"]["1"]  # type: ignore[index]
    assert first["base_sha256"] == hash_weights(world / "sd-epsilon")
    assert first["protocol"]["fingerprint"] == PROTOCOLS["toy"].fingerprint()  # type: ignore[index]
    assert "2 steps" in capsys.readouterr().out

    first["teacher"]["2"]["fid"] = 77.0  # type: ignore[index]
    out.write_text(json.dumps({"toy": first, "other": {"kept": True}}))
    second = run(world, out, "--steps", "2", "3")
    assert second["toy"]["teacher"]["2"]["fid"] == 77.0  # type: ignore[index]
    assert set(second["toy"]["teacher"]) == {"1", "2", "3"}  # type: ignore[call-overload]
    assert second["other"] == {"kept": True}

    for change in (["--guidance_scale", "4"], ["--samples", "6"]):
        out.write_text(json.dumps({"toy": first}))
        with pytest.warns(UserWarning, match="another base or protocol 'toy'"):
            other = run(world, out, "--steps", "2", *change)
        assert other["toy"]["teacher"]["2"]["fid"] != 77.0  # type: ignore[index]


def test_table_says_what_is_missing(world: Path, toy_networks: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="teacher_table: .*nowhere"):
        teacher_table.main(["--base", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out.json")])


def test_reference_is_written_and_read_back(world: Path, toy_networks: dict[str, str]) -> None:
    protocol = PROTOCOLS["toy"]
    path = protocol.path(protocol.reference)
    before = FeatureStatistics.load(path)
    path.unlink()
    reference.main(["--protocol", "toy"])
    after = FeatureStatistics.load(path, protocol.reference_origin())
    assert after.count == protocol.reference_samples
    assert torch.equal(after.mean, before.mean)


def test_a_fingerprint_follows_what_changes_the_numbers(
    world: Path, toy_networks: dict[str, str], tmp_path: Path
) -> None:
    protocol = PROTOCOLS["toy"]
    AttributeClassifier().save_pretrained(tmp_path / "classifier")
    fingerprints = [
        get_protocol("toy", **changes).fingerprint()
        for changes in (
            {},
            {"samples": 8},
            {"seed": 1},
            {"reference_samples": 41},
            {"classifier": str(tmp_path / "classifier")},
        )
    ]
    assert len(set(fingerprints)) == len(fingerprints)
    assert fingerprints[0] == protocol.fingerprint()
    assert get_protocol("toy", reference="elsewhere.npz").fingerprint() == protocol.fingerprint()


def test_held_out_prompts_are_not_those_of_the_curve() -> None:
    assert PROTOCOLS["toy"].split == "test"
    assert PROTOCOLS["toy-val"].split == "val"
    assert {PROTOCOLS[name].fresh_split for name in PROTOCOLS}.isdisjoint({"test"})
