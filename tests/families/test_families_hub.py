"""Bases by hub id: the real hub client against a small hub on this machine, and against its cache alone."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import constants

from sdxs_lightning.core.errors import UserError
from sdxs_lightning.core.hub_ids import is_hub_id
from sdxs_lightning.families.hub import needed_files
from sdxs_lightning.families.sd import StableDiffusion
from sdxs_lightning.families.sdxl import StableDiffusionXL
from sdxs_lightning.lora import MergeOptions, merge
from sdxs_lightning.networks.lora_files import write_lora
from tests.helpers.students import random_lora
from tests.helpers.tiny_releases import only_fp16, save_release

SHA = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """Models by id, and the files that were requested."""

    models: dict[str, Path]
    fetched: list[str] = field(default_factory=list)

    def respond(self, handler: BaseHTTPRequestHandler) -> tuple[int, dict[str, str], bytes]:
        parts = unquote(handler.path.split("?")[0]).strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        name = "/".join(parts[2:4] if api else parts[:2])
        if name not in self.models:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        folder = self.models[name]
        revision = parts[5] if api else parts[3]
        if revision not in ("main", SHA):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        if api and parts[4] == "revision":
            return 200, {}, json.dumps({"id": name, "sha": SHA, "siblings": []}).encode()
        if api:
            tree = [
                {
                    "type": "file",
                    "path": path.relative_to(folder).as_posix(),
                    "size": path.stat().st_size,
                    "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
                }
                for path in files
            ]
            return 200, {}, json.dumps(tree).encode()
        file = folder / "/".join(parts[4:])
        if not file.is_file():
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        if handler.command == "GET":
            self.fetched.append("/".join(parts[4:]))
        content = file.read_bytes()
        return 200, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": SHA}, content


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    found = {
        "org/sd": save_release("sd21-base", root / "sd"),
        "org/sdxs": save_release("sdxs", root / "sdxs"),
    }
    found["org/half"] = only_fp16(save_release("sd15", root / "half"))
    for name in ("sd-v1.ckpt", "sd-v1.safetensors", "unet/diffusion_pytorch_model.bin", "README.md"):
        (found["org/sd"] / name).write_bytes(b"not needed")
    only_fp16(save_release("sd21-base", root / "both"))
    for file in (root / "both").rglob("*.fp16.safetensors"):
        (found["org/sd"] / file.relative_to(root / "both")).write_bytes(file.read_bytes())
    found["org/pickles"] = save_release("sd15", root / "pickles")
    weights = found["org/pickles"] / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    return found


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def hub(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    served = Hub(models)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, content = served.respond(self)
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    yield served
    server.shutdown()
    server.server_close()


def test_fetches_what_is_needed_once_and_works_offline_afterwards(
    hub: Hub, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    family = StableDiffusion("org/sd")
    assert sorted(hub.fetched) == [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/merges.txt",
        "tokenizer/special_tokens_map.json",
        "tokenizer/tokenizer_config.json",
        "tokenizer/vocab.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    assert hub.fetched[-1] == "model_index.json"
    assert family.base == "org/sd" and family.folder.name == SHA
    local = StableDiffusion(str(models["org/sd"]))
    assert torch.equal(family.encode_prompts(["a"]).prompt_embeds, local.encode_prompts(["a"]).prompt_embeds)
    assert torch.equal(family.load_unet().conv_in.weight, local.load_unet().conv_in.weight)
    count = len(hub.fetched)
    assert StableDiffusion("org/sd").folder == StableDiffusion(f"org/sd@{SHA}").folder == family.folder
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert StableDiffusion("org/sd").folder == family.folder and len(hub.fetched) == count


def test_fp16_files_if_there_are_no_others(hub: Hub) -> None:
    family = StableDiffusion("org/half")
    assert sum(name.endswith(".fp16.safetensors") for name in hub.fetched) == 3
    assert family.load_unet().dtype == family.load_vae().dtype == torch.float32
    assert family.encode_prompts(["a"]).prompt_embeds.dtype == torch.float32


def test_a_student_by_hub_id_fetches_its_unet_alone(hub: Hub, models: dict[str, Path]) -> None:
    family = StableDiffusion(str(models["org/sd"]))
    student = family.load_unet("org/sdxs")
    assert sorted(hub.fetched) == [
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ]
    assert student.mid_block is None
    # The cached files of a student are not a base yet.
    assert StableDiffusion("org/sdxs").load_vae().config.scaling_factor == 0.5
    assert "vae_large/config.json" in hub.fetched


def test_configs_alone_for_a_single_file(hub: Hub, tmp_path: Path) -> None:
    from sdxs_lightning.families.sources import _folder_or_hub

    folder = _folder_or_hub("org/sd", StableDiffusion.layout, weights=False)
    assert (folder / "unet" / "config.json").is_file() and not list(folder.rglob("*.safetensors"))
    # The base itself then still fetches its weights.
    StableDiffusion("org/sd").load_unet()


def test_refusals_of_the_hub(hub: Hub) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"no folder 'org/none'; .* there is no model 'org/none' on the hub"
    ):
        StableDiffusion("org/none")
    with pytest.raises(FileNotFoundError, match=r"the hub model 'org/sd' has no revision 'v9'"):
        StableDiffusion("org/sd@v9")
    with pytest.raises(ValueError, match=r"'org/pickles' cannot be used: its unet/.*\.bin is a pickle"):
        StableDiffusion("org/pickles")
    with pytest.raises(ValueError, match=r"holds a StableDiffusionPipeline, and this family needs"):
        StableDiffusionXL("org/sd")
    assert not [name for name in hub.fetched if name.endswith((".bin", ".ckpt"))]


def test_refusals_without_network(monkeypatch: pytest.MonkeyPatch, models: dict[str, Path]) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder 'org/sd'; .*switched off \(HF_HUB_OFFLINE\)"):
        StableDiffusion("org/sd")
    with pytest.raises(FileNotFoundError, match=r"neither a U-Net folder .* switched off \(HF_HUB_OFFLINE\)"):
        StableDiffusion(str(models["org/sd"])).load_unet("org/student")
    # On, but nobody answers.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client tries again for half a minute
    with pytest.raises(FileNotFoundError, match=r"not complete in the cache .* and could not be fetched \("):
        StableDiffusion("org/sd")


def test_an_incomplete_cache_is_completed(hub: Hub) -> None:
    folder = StableDiffusion("org/sd").folder
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    count = len(hub.fetched)
    StableDiffusion("org/sd").load_vae()
    assert len(hub.fetched) <= count + 1


def test_what_is_needed_of_a_listing() -> None:
    names = [
        "model_index.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors.index.json",
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
        "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "unet/diffusion_flax_model.msgpack",
        "vae/config.json",
        "vae/diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
        "vae/diffusion_pytorch_model.fp16-00002-of-00002.safetensors",
        "vae/diffusion_pytorch_model.safetensors.index.fp16.json",
        "vae/diffusion_pytorch_model.bin",
        "vae_encoder/model.onnx",
        "tokenizer/vocab.json",
        "sd_xl_base_1.0.safetensors",
    ]
    assert needed_files(names, "model_index.json", ("unet", "vae", "tokenizer")) == [
        "model_index.json",
        "tokenizer/vocab.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
        "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
        "unet/diffusion_pytorch_model.safetensors.index.json",
        "vae/config.json",
        "vae/diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
        "vae/diffusion_pytorch_model.fp16-00002-of-00002.safetensors",
        "vae/diffusion_pytorch_model.safetensors.index.fp16.json",
    ]
    with pytest.raises(ValueError, match=r"unet/x.bin is a pickle"):
        needed_files(["unet/x.bin", "unet/config.json"], "model_index.json", ("unet",))


def test_what_is_a_hub_id() -> None:
    assert is_hub_id("stabilityai/stable-diffusion-2-1") and is_hub_id("org/name@refs/pr/2")
    assert not any(is_hub_id(name) for name in ("name", "./a/b", "/a/b", "a/b/c", "org/name@"))


def test_merge_fetches_the_whole_pipeline(hub: Hub, models: dict[str, Path], tmp_path: Path) -> None:
    """Not only the U-Net that the LoRA changes: the written folder is a pipeline."""
    unet = StableDiffusion(str(models["org/sd"])).load_unet()
    (tmp_path / "lora").mkdir()
    write_lora(tmp_path / "lora", random_lora(unet), dtype=torch.float32)
    out = tmp_path / "merged"
    merge(MergeOptions(model="org/sd", lora=(str(tmp_path / "lora"),), out=out))
    DiffusionPipeline.from_pretrained(out, safety_checker=None)
    index = json.loads((out / "model_index.json").read_text())
    parts = {name for name, value in index.items() if isinstance(value, list) and value[0] is not None}
    assert parts >= {"text_encoder", "tokenizer", "vae", "scheduler", "unet"}
    assert {path.name for path in out.iterdir() if path.is_dir()} == parts
    incomplete = tmp_path / "incomplete"
    shutil.copytree(models["org/sd"], incomplete, ignore=shutil.ignore_patterns("vae", "*.fp16.*", "*.bin"))
    with pytest.raises(UserError, match=r"--model '.*incomplete' lacks the component folder\(s\) vae"):
        merge(MergeOptions(model=str(incomplete), lora=(str(tmp_path / "lora"),), out=tmp_path / "never"))
