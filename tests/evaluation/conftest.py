"""ProtocolNetworks and bases shared by the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from data.toy.training.classifier import AttributeClassifier
from evaluation.networks.frozen_clip import FrozenClip
from evaluation.protocols.protocols import PROTOCOLS
from evaluation.runner.scores import measure_reference
from tests.helpers.metric_networks import small_protocols, write_clip
from tests.helpers.tiny_distillation import save_base, save_shards


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random CLIP in open_clip's local layout."""
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def clip(clip_folder: Path) -> FrozenClip:
    """The same, loaded."""
    return FrozenClip(clip_folder)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, shards and random metric networks."""
    folder = tmp_path_factory.mktemp("world")
    save_base("sd-epsilon", folder, stages=2)
    save_shards(folder / "shards")
    write_clip(folder / "clip")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AttributeClassifier().save_pretrained(folder / "classifier")
    for protocol in small_protocols(folder).values():
        measure_reference(protocol, FrozenClip(protocol.clip)).save(protocol.reference)
    return folder


@pytest.fixture
def toy_networks(world: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Arguments that name those networks; the toy protocols are small and use them."""
    for name, protocol in small_protocols(world).items():
        monkeypatch.setitem(PROTOCOLS, name, protocol)
    return {"clip": str(world / "clip"), "classifier": str(world / "classifier")}
