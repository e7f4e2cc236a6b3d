"""Single .safetensors files in the original layout: equal to the folder they were made from, or refused."""

from __future__ import annotations

import multiprocessing
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from sdxs_lightning.export import export_pipeline
from sdxs_lightning.families import single_file
from sdxs_lightning.families.sd import StableDiffusion
from sdxs_lightning.families.sdxl import StableDiffusionXL
from sdxs_lightning.families.single_file import read_header
from tests.helpers.ldm_layout import save_single_file
from tests.helpers.tiny_releases import save_release

CAPTIONS = ["a red circle", "", "a blue star above a cat"]
KINDS = {
    "sd15": (StableDiffusion, StableDiffusionPipeline),
    "sd21": (StableDiffusion, StableDiffusionPipeline),
    "sdxl": (StableDiffusionXL, StableDiffusionXLPipeline),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("single")
    for name, (_, pipeline_class) in KINDS.items():
        save_release(name, root / name)
        save_single_file(pipeline_class.from_pretrained(root / name), root / f"{name}.safetensors")
        # Configs and tokenizers are all that the folder may give.
        for weights in (root / name).rglob("*.safetensors"):
            target = root / "weights" / weights.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            weights.rename(target)
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "sdxs-lightning"


@pytest.mark.parametrize("name", KINDS)
def test_equals_the_folder_it_was_made_from(name: str, world: Path, cache: Path, tmp_path: Path) -> None:
    kind, pipeline_class = KINDS[name]
    family = kind(str(world / f"{name}.safetensors"), config=str(world / name))
    assert family.base == str(world / f"{name}.safetensors") and family.folder.parent == cache
    parts = ["unet", "vae", "text_encoder"] + (["text_encoder_2"] if name == "sdxl" else [])
    for part in parts:
        (original,) = (world / "weights" / name / part).glob("*.safetensors")
        (converted,) = (family.folder / part).glob("*.safetensors")
        expected, found = load_file(original), load_file(converted)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    pipeline = pipeline_class.from_pretrained(family.folder)
    expected_embeds = pipeline.encode_prompt(CAPTIONS, "cpu", 1, True) if name != "sdxl" else None
    if expected_embeds is not None:
        assert torch.equal(family.encode_prompts(CAPTIONS).prompt_embeds, expected_embeds[0])
    assert family.prediction_type == ("v_prediction" if name == "sd21" else "epsilon")
    exported = export_pipeline(family.load_unet(), family, tmp_path / "out", dtype=torch.float32)
    assert (exported / "tokenizer").is_dir()


def test_is_converted_once_and_again_when_the_file_or_its_configs_change(
    world: Path, cache: Path, tmp_path: Path
) -> None:
    file = tmp_path / "model.safetensors"
    tensors = load_file(world / "sd15.safetensors")
    save_file(tensors, file)
    first = StableDiffusion(str(file), config=str(world / "sd15")).folder
    made = (first / "unet" / "config.json").stat().st_mtime_ns
    assert StableDiffusion(str(file), config=str(world / "sd15")).folder == first
    assert (first / "unet" / "config.json").stat().st_mtime_ns == made
    tensors["model.diffusion_model.out.2.bias"] += 1
    save_file(tensors, file)
    second = StableDiffusion(str(file), config=str(world / "sd15"))
    assert second.folder != first
    assert torch.equal(second.load_unet().conv_out.bias, tensors["model.diffusion_model.out.2.bias"])
    configs = tmp_path / "configs"
    shutil.copytree(world / "sd15", configs)
    scheduler = configs / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace("{", '{"prediction_type": "v_prediction",', 1))
    third = StableDiffusion(str(file), config=str(configs))
    assert third.folder not in (first, second.folder) and third.prediction_type == "v_prediction"
    assert sorted(path.name for path in cache.iterdir() if path.is_dir()) == sorted(
        path.name for path in (first, second.folder, third.folder)
    )


def test_half_precision_stays_half_on_disk_and_is_widened_when_loaded(world: Path, tmp_path: Path) -> None:
    file = tmp_path / "half.safetensors"
    halved = {
        name: value.half() if value.is_floating_point() else value
        for name, value in load_file(world / "sd15.safetensors").items()
    }
    save_file(halved, file)
    family = StableDiffusion(str(file), config=str(world / "sd15"))
    (unet_file,) = (family.folder / "unet").glob("*.safetensors")
    assert {entry["dtype"] for entry in read_header(unet_file).values()} == {"F16"}
    unet = family.load_unet()
    assert unet.dtype == torch.float32
    assert torch.equal(unet.conv_in.weight, halved["model.diffusion_model.input_blocks.0.0.weight"].float())


def test_averaged_weights_are_used_if_a_file_has_both(world: Path, tmp_path: Path) -> None:
    """The original trainer keeps its average under names without dots; the released folders hold the average."""

    def with_average(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("model.diffusion_model.")]:
            tensors["model_ema." + name.removeprefix("model.").replace(".", "")] = tensors[name] + 1

    family = StableDiffusion(_changed(world, tmp_path, with_average), config=str(world / "sd15"))
    plain = load_file(world / "sd15.safetensors")["model.diffusion_model.out.2.bias"]
    assert torch.equal(family.load_unet().conv_out.bias, plain + 1)


def _folder(arguments: tuple[str, str]) -> str:
    file, config = arguments
    return str(StableDiffusion(file, config=config).folder)


def test_processes_that_start_together_convert_once(
    world: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = single_file._write

    def counted(*arguments: Any) -> None:
        with (tmp_path / "conversions").open("a") as log:
            log.write("one\n")
        written(*arguments)

    monkeypatch.setattr(single_file, "_write", counted)  # the forked processes inherit it
    arguments = str(world / "sd15.safetensors"), str(world / "sd15")
    with multiprocessing.get_context("fork").Pool(2) as pool:
        folders = set(pool.map(_folder, [arguments] * 4, chunksize=1))
    assert [path.name for path in cache.iterdir() if path.is_dir()] == [
        Path(folder).name for folder in folders
    ]
    assert (tmp_path / "conversions").read_text() == "one\n"


def test_without_a_lock_the_second_process_keeps_the_first_folder(world: Path, tmp_path: Path) -> None:
    file, configs, target = world / "sd15.safetensors", world / "sd15", tmp_path / "made"
    for _ in range(2):
        single_file._write(file, configs, StableDiffusion.layout, read_header(file), target)
        (target / "mark").touch()
    assert (target / "mark").is_file() and (target / "model_index.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def _changed(world: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> str:
    tensors = load_file(world / "sd15.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "changed.safetensors")
    return str(tmp_path / "changed.safetensors")


def _without(beginning: str) -> Callable[[dict[str, torch.Tensor]], object]:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(beginning)]:
            del tensors[name]

    return drop


def test_refusals_name_the_cause(world: Path, cache: Path, tmp_path: Path) -> None:
    file, config = str(world / "sd15.safetensors"), str(world / "sd15")
    with pytest.raises(
        ValueError, match=r"neither configs nor tokenizers; name .* as family.init_args.config"
    ):
        StableDiffusion(file)
    with pytest.raises(ValueError, match=r"config '.*' is for a base that is a single .safetensors file"):
        StableDiffusion(config, config=config)
    with pytest.raises(FileNotFoundError, match=r"there is no file '.*absent.safetensors'"):
        StableDiffusion(str(tmp_path / "absent.safetensors"), config=config)
    with pytest.raises(
        FileNotFoundError, match=r"there is no folder '.*absent'; .* as family.init_args.config"
    ):
        StableDiffusion(file, config=str(tmp_path / "absent"))
    with pytest.raises(
        ValueError, match=r"holds an SDXL model, and this family needs a StableDiffusionPipeline"
    ):
        StableDiffusion(str(world / "sdxl.safetensors"), config=config)
    with pytest.raises(
        ValueError, match=r"holds an SD-1.x/2.x model, and this family needs a StableDiffusionXLP"
    ):
        StableDiffusionXL(file, config=str(world / "sdxl"))
    with pytest.raises(
        ValueError, match=r"lacks the weights of vae; a base needs all of unet, vae, text_encoder"
    ):
        StableDiffusion(_changed(world, tmp_path, _without("first_stage_model.")), config=config)
    with pytest.raises(
        ValueError, match=r"not in the original layout .* 'model.diffusion_model.|begins with model.d"
    ):
        StableDiffusion(str(next((world / "weights" / "sd15" / "unet").iterdir())), config=config)
    lacking = _changed(world, tmp_path, _without("model.diffusion_model.middle_block.2.out_layers.3"))
    with pytest.raises(
        ValueError, match=r"lacks tensors that '.*sd15' describes; is it cut off or of another ver"
    ):
        StableDiffusion(lacking, config=config)
    encoder = "cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc2"
    with pytest.raises(
        ValueError, match=r"lacks 2 tensor\(s\) of the text_encoder that .*such as encoder.layers.1"
    ):
        StableDiffusion(_changed(world, tmp_path, _without(encoder)), config=config)
    with pytest.raises(ValueError, match=r"does not fit the configs of '.*sd15' .*expected shape"):
        StableDiffusion(str(world / "sd21.safetensors"), config=config)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((world / "sd15.safetensors").read_bytes()[:-1])
    with pytest.raises(ValueError, match="was its download cut off"):
        StableDiffusion(str(cut), config=config)
    cut.write_bytes(b"PK\x03\x04 renamed pickle")
    with pytest.raises(ValueError, match="is not a safetensors file, whatever its name says"):
        StableDiffusion(str(cut), config=config)
    with pytest.raises(ValueError, match="AutoencoderTiny as vae, which no single file holds"):
        StableDiffusion(file, config=str(save_release("sdxs", tmp_path / "sdxs")))
    assert not cache.exists() or not [path for path in cache.iterdir() if path.is_dir()]


def test_a_cache_that_cannot_be_written(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "occupied").write_text("in the way")
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "occupied"))
    with pytest.raises(OSError, match=r"could not be converted into .*set the environment variable HF_HOME"):
        StableDiffusion(str(world / "sd15.safetensors"), config=str(world / "sd15"))
