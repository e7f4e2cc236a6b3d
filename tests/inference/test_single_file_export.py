"""Single files: names of the original code, read back by our own loader bit by bit, and what recognises them as what."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from huggingface_hub import constants
from safetensors.torch import load_file

from evaluation.benchmarks.full_size import sd15_unet_config, sd21_unet_config, sdxl_unet_config
from sdxs_lightning.core.errors import UserError
from sdxs_lightning.export_runtime import main
from sdxs_lightning.families.detect import detect_family
from sdxs_lightning.inference.exporting import single_file
from sdxs_lightning.inference.exporting.original_names import original_unet, taesd
from sdxs_lightning.inference.exporting.single_file import (
    export_single_file,
    needs_gaps,
    sd_cpp_topology,
    sd_cpp_version,
)
from sdxs_lightning.surgery.config import prune_config
from sdxs_lightning.surgery.presets import PRESETS
from tests.helpers.ldm_layout import ldm_unet, ldm_vae
from tests.helpers.students import save_student
from tests.helpers.tiny_releases import save_release

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))


def as_student(base: Path, kind: Any) -> Path:
    """A release with the scheduler of an exported student."""
    from sdxs_lightning.export import one_step_scheduler

    family = detect_family(str(base))
    one_step_scheduler(family, family.conditioning_timestep).save_pretrained(base / "scheduler")
    return base


@pytest.mark.parametrize("name", ["sd15", "sd21-base", "sdxl", "vega", "sdxs"])
def test_round_trip_through_the_own_loader(name: str, tmp_path: Path) -> None:
    student = as_student(save_release(name, tmp_path / name), name)
    export_single_file(student, tmp_path / "out", "fp32")
    configs = student
    if name == "sdxs":  # the loader wants configs whose VAE is the file's
        configs = tmp_path / "configs"
        shutil.copytree(student, configs)
        shutil.rmtree(configs / "vae")
        shutil.copytree(student / "vae_large", configs / "vae")
        index = json.loads((configs / "model_index.json").read_text())
        (configs / "model_index.json").write_text(json.dumps(index | {"vae": ["diffusers", "AutoencoderKL"]}))
    family = detect_family(str(tmp_path / "out" / "model.safetensors"), str(configs))
    original = detect_family(str(student))
    pairs: list[tuple[Any, Any]] = [
        (family.load_unet(), original.load_unet()),
        (family.load_vae(), original.load_vae()),
    ]
    for found, expected in pairs:
        theirs, ours = expected.state_dict(), found.state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)
    prompts = ["a red circle", ""]
    assert torch.equal(
        family.encode_prompts(prompts).prompt_embeds, original.encode_prompts(prompts).prompt_embeds
    )


@pytest.mark.parametrize(
    ("name", "kind"), [("sd15", StableDiffusionPipeline), ("sdxl", StableDiffusionXLPipeline)]
)
def test_names_are_those_of_an_independent_converter(name: str, kind: Any, tmp_path: Path) -> None:
    student = as_student(save_release(name, tmp_path / name), name)
    export_single_file(student, tmp_path / "out", "fp16")
    found = load_file(tmp_path / "out" / "model.safetensors")
    pipeline = kind.from_pretrained(student)
    expected = {f"model.diffusion_model.{key}": value for key, value in ldm_unet(pipeline.unet).items()}
    expected |= {f"first_stage_model.{key}": value for key, value in ldm_vae(pipeline.vae).items()}
    prefixes = ("model.diffusion_model.", "first_stage_model.")
    assert {key for key in found if key.startswith(prefixes)} == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == torch.float16 and torch.equal(found[key], value.half())
    assert all(value.is_contiguous() for value in found.values())


def keys_of(config: dict[str, Any], gaps: bool) -> set[str]:
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            **{key: value for key, value in config.items() if not key.startswith("_")}
        )
    return set(original_unet(unet.config, unet.state_dict(), gaps))


def test_presets_satisfy_the_published_detection_rule() -> None:
    complete = {"sd15": sd15_unet_config(), "sd21": sd21_unet_config(), "sdxl": sdxl_unet_config()}
    pruned = prune_config(complete["sd15"], PRESETS["sdxs-512"])
    for gaps in (False, True):
        keys = keys_of(pruned, gaps)
        assert not any(key.startswith("model.diffusion_model.middle_block.1") for key in keys)
        assert not any(key.startswith("model.diffusion_model.output_blocks.7.1") for key in keys)
    # Blocks at the places of the complete network's: three numbers a stage.
    blocks = {key.split(".")[3] for key in keys if ".input_blocks." in key}
    assert blocks == {"0", "1", "3", "4", "6", "7"}
    outputs = {key.split(".", 2)[2].rpartition(".")[0] for key in keys if ".output_blocks." in key}
    assert {name.split(".")[1] for name in outputs} == {"0", "1", "2", "3", "4", "5", "6", "7"}
    # What diffusers' script writes and stable-diffusion.cpp's constructor asks for: the third place of each stage, after an
    # attention layer except in the first stage, whether there is one or not.
    assert {name for name in outputs if name.endswith(".conv")} == {
        "output_blocks.2.1.conv",
        "output_blocks.5.2.conv",
    }
    assert {key.split(".")[3] for key in keys_of(pruned, False) if ".input_blocks." in key} == set("012345")
    tiny = keys_of(prune_config(complete["sd15"], PRESETS["bk-tiny"]), True)
    assert any(key.startswith("model.diffusion_model.output_blocks.7.1") for key in tiny)
    named = {
        ("sd15", "sdxs-512"): ("SDXS-512", "SDXS-512"),
        ("sd15", "bk-tiny"): ("SD-1.x with a tiny U-Net", "SD-1.x with a tiny U-Net"),
        ("sd15", "bk-small"): ("SD-1.x with a tiny U-Net", None),
        ("sd21", "bk-tiny"): ("SD-2.x with a tiny U-Net", "SD-2.x with a tiny U-Net"),
        ("sd21", "sdxs-512"): ("SD-2.x with a tiny U-Net", "SDXS-512"),
        ("sdxl", "sdxs-1024"): (None, None),
    }
    for (base, preset), expected in named.items():
        config = prune_config(complete[base], PRESETS[preset])
        found = sd_cpp_version(config, config["cross_attention_dim"]), sd_cpp_topology(config)
        assert found == expected, (base, preset)
        assert needs_gaps(config) == (base != "sdxl")


def test_a_student_with_tiny_decoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    student = save_student(tmp_path, "midless", mid=None, tiny=True)
    main([str(student), "--to", "single-file", "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "model_sd_cpp.safetensors" in said and "taesd_decoder.safetensors" in said
    assert "warning" not in said  # three stages of one layer, no attention in the first: SDXS-512's topology
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {
        "model.safetensors",
        "model_sd_cpp.safetensors",
        "taesd_decoder.safetensors",
        "taesd_encoder.safetensors",
        "README.txt",
        "sdxs_runtime.json",
    }
    decoder = load_file(tmp_path / "out" / "taesd_decoder.safetensors")
    weights = AutoencoderTiny.from_pretrained(student / "vae").state_dict()
    # TAESD's sequence: a clamp, the first convolution, an activation, blocks.
    assert torch.equal(decoder["1.weight"], weights["decoder.layers.0.weight"].half())
    assert decoder.keys() == taesd(weights, "decoder").keys()
    assert len(decoder) == sum(name.startswith("decoder.") for name in weights)
    encoder = load_file(tmp_path / "out" / "taesd_encoder.safetensors")
    assert torch.equal(encoder["0.weight"], weights["encoder.layers.0.weight"].half())


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_what_other_programs_guess_wrongly_is_said(prediction: str, tmp_path: Path) -> None:
    student = tmp_path / "student"
    shutil.copytree(ROOT / "data" / "toy" / "student", student)  # of timestep 699
    scheduler = student / "scheduler" / "scheduler_config.json"
    config = json.loads(scheduler.read_text()) | {"prediction_type": prediction}
    scheduler.write_text(json.dumps(config))
    notes = "\n".join(export_single_file(student, tmp_path / "out", "fp16"))
    kept = DDIMScheduler.from_config(config).alphas_cumprod[699].item()
    sigma = ((1 - kept) / kept) ** 0.5
    assert f"this student at 699: give ComfyUI's SamplerCustom the sigmas {sigma:.4f}, 0;" in notes
    assert "--cfg-scale" not in notes  # stable-diffusion.cpp would begin at 999
    assert ("set v_prediction by hand" in notes) == (prediction == "v_prediction")


def test_a_file_that_reads_back_otherwise_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = save_student(tmp_path, "midless", mid=None, tiny=True)

    def swapped(config: Any, weights: dict[str, Any], gaps: bool = False) -> dict[str, Any]:
        named = original_unet(config, weights, gaps)
        one, other = (f"model.diffusion_model.time_embed.{layer}.bias" for layer in (0, 2))
        named[one], named[other] = named[other], named[one]
        return named

    monkeypatch.setattr(single_file, "original_unet", swapped)
    with pytest.raises(UserError, match=r"2 of them different \(time_embedding.linear_1.bias"):
        export_single_file(student, tmp_path / "out", "fp16")
    monkeypatch.undo()
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(single_file, "original_clip", lambda *_: {"clip.weight": torch.tensor([1e6])})
    with pytest.raises(UserError, match="clip.weight has NaN, or values that fp16 cannot hold"):
        export_single_file(student, tmp_path / "out", "fp16")
    assert not (tmp_path / "out").exists()


def test_layers_that_differ_by_stage_have_no_numbers() -> None:
    config = sd15_unet_config() | {"layers_per_block": [1, 2, 1, 1], "addition_embed_type": None}
    with pytest.raises(UserError, match=r"layers_per_block \[1, 2, 1, 1\], and single files need one number"):
        original_unet(config, {})
