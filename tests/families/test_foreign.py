"""Model folders of others: nothing is unpickled, imported from the folder, or fetched from a hub."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model

from data.conditions import Depth, UnloadableConditionError
from evaluation.networks.clip_loading import load_folder, load_transformers
from evaluation.networks.vit_features import DinoV2Features
from sdxs_lightning.core.hub_ids import is_hub_id
from sdxs_lightning.families.folders import check_libraries
from sdxs_lightning.networks.image_features import Dinov2Features, OpenClipFeatures, TimmFeatures
from tests.helpers.tiny_run import ROOT

CLIP = ROOT / "data" / "toy" / "clip"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a folder reached for the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


def changed(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """The toy CLIP with another configuration."""
    shutil.copytree(CLIP, folder)
    file = folder / "open_clip_config.json"
    config = json.loads(file.read_text())
    change(config["model_cfg"])
    file.write_text(json.dumps(config))
    return folder


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "text tower of the hub": (
        lambda config: config["text_cfg"].update(hf_model_name="org/text", proj_type="linear"),
        "takes its text tower 'org/text' from the hub",
    ),
    "image tower of the hub": (
        lambda config: config["vision_cfg"].update(timm_model_name="hf-hub:org/vit"),
        "takes its image tower 'hf-hub:org/vit' from elsewhere",
    ),
    "code of the tokenizer": (
        lambda config: config["text_cfg"].update(tokenizer_kwargs={"trust_remote_code": True}),
        "'trust_remote_code', which imports code",
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_open_clip_loads_a_folder_from_its_own_files(case: str, tmp_path: Path) -> None:
    change, message = CHANGES[case]
    folder = changed(tmp_path / "clip", change)
    with pytest.raises(ValueError, match=message):
        load_folder(folder)
    with pytest.raises(ValueError, match=message):
        OpenClipFeatures(str(folder), [0]).load()


@pytest.mark.parametrize(
    "name", ["open_clip_pytorch_model.bin", "open_clip_model.pt", "weights.pkl", "x.pth"]
)
def test_open_clip_folders_with_pickles_only_are_refused(name: str, tmp_path: Path) -> None:
    folder = changed(tmp_path / "clip", lambda config: None)
    (folder / "open_clip_model.safetensors").rename(folder / name)
    for load in (lambda: load_folder(folder), lambda: OpenClipFeatures(str(folder), [0]).load()):
        with pytest.raises(ValueError, match=rf"only pickled weights \({name}\), which run code"):
            load()


def test_open_clip_folders_without_weights_or_tokenizer_are_refused(tmp_path: Path) -> None:
    folder = changed(tmp_path / "clip", lambda config: None)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="has no tokenizer files"):
        load_folder(folder)
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="has no weights: expected open_clip_model.safetensors"):
        load_folder(folder)


def test_transformers_folders_with_pickles_or_code_are_refused(tmp_path: Path) -> None:
    tower = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    clip = CLIPModel(CLIPConfig(text_config=tower, vision_config=tower, projection_dim=4))
    dinov2 = Dinov2Model(Dinov2Config(**tower, image_size=28))
    for name, model in {"clip": clip, "dinov2": dinov2}.items():
        model.save_pretrained(tmp_path / name)
        (tmp_path / name / "model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / name / "pytorch_model.bin")
    loads: list[Callable[[], Any]] = [
        lambda: load_transformers(tmp_path / "clip"),
        lambda: DinoV2Features(tmp_path / "dinov2"),
        lambda: Dinov2Features(str(tmp_path / "dinov2"), [0]).load(),
    ]
    for load in loads:
        with pytest.raises(ValueError, match=r"only pickled weights \(pytorch_model.bin\)"):
            load()
    for name in ("clip", "dinov2"):
        file = tmp_path / name / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": {"AutoModel": "evil.Evil"}}))
    for load in loads:
        with pytest.raises(ValueError, match="has 'auto_map', which imports code"):
            load()


def test_timm_takes_weights_from_its_checkpoint_only(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has checkpoint_path, but weights come from the file"):
        TimmFeatures("resnet10t", "x.safetensors", [0], arguments={"checkpoint_path": "evil.pth"})
    (tmp_path / "x.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="timm has no model 'hf-hub:org/x'"):
        TimmFeatures("hf-hub:org/x", str(tmp_path / "x.safetensors"), [0]).load()


@pytest.mark.parametrize(
    "load",
    [
        lambda path: load_transformers(path),
        lambda path: DinoV2Features(path),
        lambda path: Depth(path)(torch.zeros(8, 8, 3, dtype=torch.uint8).numpy()),
    ],
    ids=["clip", "dinov2", "depth"],
)
@pytest.mark.parametrize(
    "path", ["../missing", "./missing", "/no/such", "folder/missing", "~/missing", "a/b/c"]
)
def test_a_missing_folder_is_not_looked_for_on_the_hub(
    load: Callable[[str], Any], path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises((FileNotFoundError, UnloadableConditionError), match=f"there is no folder '{path}'"):
        load(path)


def test_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ids = ("stabilityai/sdxl-turbo", "a/b", "IDKiro/sdxs-512-0.9", "org/name@refs/pr/2", "o-r.g/n_a.m-e")
    assert all(map(is_hub_id, ids))
    paths = (
        "name",
        "../x",
        "./x",
        "x/..",
        "x/.",
        "/x",
        "~/x",
        "a/b/c",
        "a/b/",
        "a//b",
        ".x/y",
        "x/.y",
        "x/a..b",
        "x/y.git",
        "models/x",
        "outputs/x",
    )
    assert not any(map(is_hub_id, (*paths, "x/y@", "x/ü", "x/y z", "")))
    (tmp_path / "a").mkdir()
    assert not is_hub_id("a/b") and is_hub_id("a/b@main") and is_hub_id("models/x@main")


def test_components_of_other_libraries_are_refused() -> None:
    known = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.42.1",
        "requires_safety_checker": False,
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "image_encoder": [None, None],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "text_encoder": ["transformers", "CLIPTextModel"],
    }
    check_libraries(Path("m"), known)
    for name, value in {
        "unet": ["os", "system"],
        "_class_name": ["pipeline", "Evil"],
        "vae": ["evil", "X"],
    }.items():
        with pytest.raises(ValueError, match=f"takes {name} from '{value[0]}', which would be imported"):
            check_libraries(Path("m"), known | {name: value})
