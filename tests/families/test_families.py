"""Families against the diffusers pipelines, and their refusals."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from jsonargparse import ArgumentParser
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from sdxs_lightning.export import export_pipeline
from sdxs_lightning.families import Family
from sdxs_lightning.families.sd import StableDiffusion
from sdxs_lightning.families.sdxl import StableDiffusionXL
from sdxs_lightning.families.weights import load_network, weight_files
from sdxs_lightning.memory_plan.weightless import WeightlessFamily
from tests.helpers.tiny import (
    LATENT_SHAPE,
    RESOLUTION_PX,
    save_tiny_sd,
    save_tiny_sdxl,
    tiny_sd_unet,
    tiny_sdxl_unet,
)
from tests.helpers.tiny_releases import only_fp16, only_pickles, unet_like

CAPTIONS = ["a red circle", "", "a small green square above a large blue star on a white background"]


@pytest.fixture(scope="module")
def sd_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_sd(tmp_path_factory.mktemp("sd") / "base", "v_prediction")


@pytest.fixture(scope="module")
def sdxl_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_sdxl(tmp_path_factory.mktemp("sdxl") / "base")


def test_sd_prompts_and_constants_equal_the_pipeline(sd_base: Path) -> None:
    family = StableDiffusion(str(sd_base))
    pipeline = StableDiffusionPipeline.from_pretrained(sd_base)
    cond, uncond = pipeline.encode_prompt(CAPTIONS, "cpu", 1, True)
    found = family.encode_prompts(CAPTIONS)
    assert torch.equal(found.prompt_embeds, cond)
    assert found.negative_prompt_embeds is not None and torch.equal(found.negative_prompt_embeds, uncond)
    assert not found.prompt_embeds.requires_grad
    assert family.latent_shape() == LATENT_SHAPE and family.latent_shape(64) == (4, 32, 32)
    assert (family.resolution, family.conditioning_timestep) == (RESOLUTION_PX, 999)
    assert (family.prediction_type, family.scaling_factor) == ("v_prediction", 0.5)
    assert isinstance(family, Family)


def test_sdxl_prompts_sizes_and_zeros_equal_the_pipeline(sdxl_base: Path) -> None:
    family = StableDiffusionXL(str(sdxl_base))
    pipeline = StableDiffusionXLPipeline.from_pretrained(sdxl_base)
    cond, uncond, pooled, uncond_pooled = pipeline.encode_prompt(CAPTIONS, device="cpu")
    found = family.encode_prompts(CAPTIONS)
    assert found.negative_prompt_embeds is not None and found.negative_pooled_prompt_embeds is not None
    assert found.pooled_prompt_embeds is not None and found.add_time_ids is not None
    assert torch.equal(found.prompt_embeds, cond) and torch.equal(found.pooled_prompt_embeds, pooled)
    assert torch.equal(found.negative_prompt_embeds, uncond)
    assert torch.equal(found.negative_pooled_prompt_embeds, uncond_pooled) and uncond_pooled.abs().sum() == 0
    assert found.add_time_ids.tolist() == [[32, 32, 0, 0, 32, 32]] * 3
    sizes, crops = torch.tensor([[640, 480]] * 3), torch.tensor([[7, 9]] * 3)
    time_ids = family.encode_prompts(CAPTIONS, sizes, crops).add_time_ids
    assert time_ids is not None and time_ids.tolist() == [[640, 480, 7, 9, 32, 32]] * 3
    assert family.conditioning_timestep == 399 and isinstance(family, Family)


def test_decode_equals_the_vae_and_dtype_is_the_text_encoders(sd_base: Path) -> None:
    family = StableDiffusion(str(sd_base)).to(dtype=torch.bfloat16)
    latents = torch.randn(2, *LATENT_SHAPE)
    with torch.no_grad():
        expected = family.load_vae().decode(latents / 0.5).sample
    torch.testing.assert_close(family.decode(latents), expected, rtol=1e-5, atol=1e-5)
    assert family.encode_prompts(["a"]).prompt_embeds.dtype == torch.bfloat16
    assert family.to(dtype=torch.float32).encode_prompts(["a"]).prompt_embeds.dtype == torch.float32


def test_unet_is_loaded_from_base_pipeline_or_unet_folder(sd_base: Path, sdxl_base: Path) -> None:
    family = StableDiffusion(str(sd_base))
    unets = [family.load_unet(), family.load_unet(str(sd_base)), family.load_unet(str(sd_base / "unet"))]
    for unet in unets:
        assert torch.equal(unet.conv_in.weight, unets[0].conv_in.weight) and unet.dtype == torch.float32
    assert unets[0] is not unets[1]
    with pytest.raises(ValueError, match=r"reads prompts of width 48, .* give 32"):
        family.load_unet(str(sdxl_base))
    with pytest.raises(FileNotFoundError, match="neither a U-Net folder"):
        family.load_unet(str(sd_base / "vae" / "nothing"))


def test_refusals_name_the_cause(sd_base: Path, sdxl_base: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder '.*absent'"):
        StableDiffusion(str(tmp_path / "absent"))
    with pytest.raises(FileNotFoundError, match=r"no model_index.json"):
        StableDiffusion(str(tmp_path))
    with pytest.raises(
        ValueError, match="holds a StableDiffusionXLPipeline, and this family needs a StableDiffusionP"
    ):
        StableDiffusion(str(sdxl_base))
    with pytest.raises(ValueError, match="choose the other family.class_path"):
        StableDiffusionXL(str(sd_base))
    with pytest.raises(ValueError, match=r"must be in \[0, 999\], got 1000"):
        StableDiffusion(str(sd_base), conditioning_timestep=1000)
    with pytest.raises(ValueError, match=r"config.json' is a file; give a diffusers folder"):
        StableDiffusion(str(sd_base / "unet" / "config.json"))
    (sd_copy := tmp_path / "broken").mkdir()
    shutil.copytree(sd_base, sd_copy, dirs_exist_ok=True)
    shutil.rmtree(sd_copy / "text_encoder")
    with pytest.raises(FileNotFoundError, match=r"lacks the component folder\(s\) text_encoder"):
        StableDiffusion(str(sd_copy))
    (sd_copy / "text_encoder").mkdir()
    (sd_copy / "vae" / "config.json").write_text('{"scaling')
    with pytest.raises(ValueError, match=r"config.json' is not readable as JSON"):
        StableDiffusion(str(sd_copy))
    (sd_copy / "vae" / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"config.json' must hold a JSON object, got a list"):
        StableDiffusion(str(sd_copy))
    (sd_copy / "vae" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"vae/config.json' is missing"):
        StableDiffusion(str(sd_copy))
    (sd_copy / "vae" / "config.json").write_text('{"_class_name": "VQModel"}')
    with pytest.raises(ValueError, match=r"holds a VQModel, expected an AutoencoderKL or an AutoencoderTiny"):
        StableDiffusion(str(sd_copy))


def test_an_unknown_scheduler_is_refused(sd_base: Path, tmp_path: Path) -> None:
    shutil.copytree(sd_base, tmp_path / "flow")
    scheduler = tmp_path / "flow" / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace('"v_prediction"', '"flow_prediction"'))
    with pytest.raises(ValueError, match=r"prediction_type 'flow_prediction', known are epsilon"):
        StableDiffusion(str(tmp_path / "flow"))


def test_pickles_are_refused_unopened(sd_base: Path, tmp_path: Path) -> None:
    """Their content is not a pickle: opening one would raise another error."""
    for name in ("model.ckpt", "model.bin", "model.pt"):
        (tmp_path / name).write_bytes(b"never to be read")
        with pytest.raises(
            ValueError, match=rf"base '.*{name}' is a pickle, which runs code when it is loaded"
        ):
            StableDiffusion(str(tmp_path / name))
    for part in ("unet", "vae", "text_encoder"):
        base = tmp_path / part
        shutil.copytree(sd_base, base)
        only_pickles(base / part)
        with pytest.raises(
            ValueError, match=rf"{part}' has only pickled weights \(diffusion_pytorch_model.bin\)"
        ):
            StableDiffusion(str(base))
    family = StableDiffusion(str(sd_base))
    with pytest.raises(ValueError, match=r"unet' has only pickled weights"):
        family.load_unet(str(tmp_path / "unet" / "unet"))
    with pytest.raises(ValueError, match=r"weights '.*model.ckpt' is a pickle"):
        family.load_unet(str(tmp_path / "model.ckpt"))
    with pytest.raises(ValueError, match=r"weights '.*' is a file; give a U-Net folder"):
        family.load_unet(str(sd_base / "unet" / "diffusion_pytorch_model.safetensors"))


def test_a_base_without_unet_weights_works_until_they_are_loaded(sd_base: Path, tmp_path: Path) -> None:
    """Training a U-Net from its config begins so."""
    shutil.copytree(sd_base, tmp_path / "new")
    (tmp_path / "new" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    family = StableDiffusion(str(tmp_path / "new"))
    assert family.unet_config["cross_attention_dim"] == 32
    with pytest.raises(FileNotFoundError, match=r"unet' has no weights: expected diffusion_pytorch_model"):
        family.load_unet()


def test_weights_that_do_not_fill_the_network(sd_base: Path, tmp_path: Path) -> None:
    shutil.copytree(sd_base, tmp_path / "cut")
    file = tmp_path / "cut" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["conv_out.bias"], tensors["conv_out.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    family = StableDiffusion(str(tmp_path / "cut"))
    with pytest.raises(
        ValueError, match=r"lack 2 tensor\(s\) of the network in its config.json, such as conv_out.bias"
    ):
        family.load_unet()
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"the weights in '.*unet' cannot be loaded: \w+Error"):
        family.load_unet()


def test_students_that_do_not_fit_the_base(sd_base: Path, sdxl_base: Path, tmp_path: Path) -> None:
    family = StableDiffusion(str(sd_base))
    unet_like(tiny_sd_unet(), in_channels=9).save_pretrained(tmp_path / "inpainting")
    for one in (family, WeightlessFamily(family)):  # that of a memory plan
        for other, message in (
            (tmp_path / "inpainting", r"has in_channels 9, and that of '.*' has 4"),
            (sdxl_base, "reads prompts of width 48, .* give 32"),
        ):
            with pytest.raises(ValueError, match=rf"^pairs.weights: the U-Net in '.*' {message}"):
                one.load_unet(str(other), "pairs.weights")
    with pytest.raises(ValueError, match=r"holds a AutoencoderKL, expected a UNet2DConditionModel"):
        family.load_unet(str(sd_base / "vae"))
    epsilon = save_tiny_sd(tmp_path / "epsilon")
    with pytest.raises(
        ValueError, match=r"predicts epsilon \(its scheduler/.*\), and that of '.*' v_prediction"
    ):
        family.load_unet(str(epsilon))
    wide = unet_like(tiny_sdxl_unet(), projection_class_embeddings_input_dim=6 * 8 + 32)
    wide.save_pretrained(tmp_path / "wide")
    with pytest.raises(
        ValueError, match=r"has projection_class_embeddings_input_dim 80, and that of '.*' has 72"
    ):
        StableDiffusionXL(str(sdxl_base)).load_unet(str(tmp_path / "wide"))


def test_shards_and_fp16_files_give_the_same_networks(sd_base: Path, tmp_path: Path) -> None:
    complete = StableDiffusion(str(sd_base))
    shutil.copytree(sd_base, tmp_path / "shards")
    (tmp_path / "shards" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    complete.load_unet().save_pretrained(tmp_path / "shards" / "unet", max_shard_size="100KB")
    assert len(list((tmp_path / "shards" / "unet").glob("*-of-*.safetensors"))) > 1
    sharded = StableDiffusion(str(tmp_path / "shards")).load_unet()
    expected = complete.load_unet().state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in sharded.state_dict().items())
    half = StableDiffusion(str(only_fp16(Path(shutil.copytree(sd_base, tmp_path / "half")))))
    for name, value in half.load_unet().state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, expected[name].half().float())
    assert half.load_vae().dtype == half.encode_prompts(["a"]).prompt_embeds.dtype == torch.float32
    exported = export_pipeline(half.load_unet(), half, tmp_path / "out")
    assert (exported / "vae" / "diffusion_pytorch_model.safetensors").is_file()


def test_sharded_fp16_files(sd_base: Path, tmp_path: Path) -> None:
    shutil.copytree(sd_base, tmp_path / "base")
    (tmp_path / "base" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    halved = StableDiffusion(str(sd_base)).load_unet().half()
    halved.save_pretrained(tmp_path / "base" / "unet", max_shard_size="50KB", variant="fp16")
    names = [path.name for path in (tmp_path / "base" / "unet").iterdir()]
    files = weight_files(names)
    assert files is not None and files.variant == "fp16" and len(files.names) > 2
    found = StableDiffusion(str(tmp_path / "base")).load_unet().state_dict()
    assert all(torch.equal(found[name], value.float()) for name, value in halved.state_dict().items())


def test_construction_reads_no_weights(sd_base: Path, tmp_path: Path) -> None:
    shutil.copytree(sd_base, tmp_path / "base")
    for file in (tmp_path / "base").rglob("*.safetensors"):
        file.write_bytes(b"")
    assert StableDiffusion(str(tmp_path / "base")).unet_config["block_out_channels"] == [8, 8, 12]


def test_networks_are_built_without_memory_of_their_own(
    sd_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of 2.6 billion parameters would otherwise be in memory twice."""
    built: list[bool] = []
    reset = torch.nn.Linear.reset_parameters

    def recorded(layer: torch.nn.Linear) -> None:
        built.append(layer.weight.is_meta)
        reset(layer)

    monkeypatch.setattr(torch.nn.Linear, "reset_parameters", recorded)
    family = StableDiffusion(str(sd_base))
    loaded = family.load_unet(), family.load_vae()
    assert built and all(built)
    assert not any(value.is_meta for network in loaded for value in network.state_dict().values())


@pytest.mark.parametrize("prefix", ["text_model.", ""])
def test_text_encoders_of_older_and_newer_transformers(sdxl_base: Path, tmp_path: Path, prefix: str) -> None:
    """Names in the file have a prefix or, from newer versions, none; the oldest version that we allow reads only the former."""
    for name, network in (("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection)):
        folder = tmp_path / name
        shutil.copytree(sdxl_base / name, folder)
        file = folder / "model.safetensors"
        plain = {name.removeprefix("text_model."): value for name, value in load_file(file).items()}
        named = {
            name if name.startswith("text_projection") else prefix + name: value
            for name, value in plain.items()
        }
        save_file(named, file, {"format": "pt"})
        loaded = load_network(network, folder).state_dict()
        assert {name.removeprefix("text_model.") for name in loaded} == plain.keys()
        for name, value in loaded.items():
            torch.testing.assert_close(value, plain[name.removeprefix("text_model.")], rtol=0, atol=0)


def test_the_unconditional_twin_follows_the_dtype(sd_base: Path) -> None:
    family = StableDiffusion(str(sd_base))
    family.encode_prompts(["a"])
    moved = family.to(dtype=torch.bfloat16).encode_prompts(["a"]).negative_prompt_embeds
    fresh = (
        StableDiffusion(str(sd_base)).to(dtype=torch.bfloat16).encode_prompts(["a"]).negative_prompt_embeds
    )
    assert moved is not None and fresh is not None and torch.equal(moved, fresh)


def test_yaml_names_the_config_of_a_single_file() -> None:
    """`config` is a word of the command line too: inside init_args it is the family's."""
    parser = ArgumentParser(parser_mode="omegaconf+")
    parser.add_argument("--family", type=Family)
    given = {
        "class_path": "sdxs_lightning.families.sd.StableDiffusion",
        "init_args": {"base": "a", "config": "b"},
    }
    assert parser.parse_object({"family": given}).family.init_args.config == "b"
    path = "--family=sdxs_lightning.families.sd.StableDiffusion"
    parsed = parser.parse_args([path, "--family.base=a", "--family.config=org/configs"])
    assert parsed.family.init_args.config == "org/configs"
