"""The reference statistics and fingerprints of the toy world's protocols."""

from __future__ import annotations

from pathlib import Path

import torch

from data.toy.training.classifier import AttributeClassifier
from evaluation import reference
from evaluation.metrics.frechet import FeatureStatistics
from evaluation.protocols.protocols import PROTOCOLS, get_protocol


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
