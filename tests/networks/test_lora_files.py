"""LoRA files: what diffusers, PEFT and kohya write is read, what is written they load, and both give the merged network."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import convert_state_dict_to_kohya
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdxs_lightning.core.errors import UserError
from sdxs_lightning.networks.controlnet import StudentControlNet, controlnet_from_unet
from sdxs_lightning.networks.lora import ADAPTER, TARGETS, LoRA, add_lora, merged_weights
from sdxs_lightning.networks.lora_extraction import extract_lora
from sdxs_lightning.networks.lora_files import (
    DIFFUSERS_FILE,
    PEFT_CONFIG,
    Adapters,
    LowRank,
    add_to_weights,
    live_adapters,
    parameter_count,
    read_lora,
    write_lora,
)
from sdxs_lightning.surgery.presets import PRESETS
from sdxs_lightning.surgery.pruning import prune
from sdxs_lightning.surgery.topology import Stage, Topology
from tests.helpers.tiny import save_tiny_sd, save_tiny_sdxl, tiny_conditioning, tiny_sd_unet, tiny_sdxl_unet
from tests.networks.test_lora import move

FORMATS = ("diffusers", "peft", "kohya")
KINDS = ("sd", "sdxl", "pruned")
PRUNED = Topology(stages=(Stage(), Stage()), mid_block="none")
SIZE = 0.3
"""Of the tests' adapters, large enough that a wrong scale shows."""


def unet_of(kind: str) -> UNet2DConditionModel:
    """A tiny U-Net; "pruned" is that of SD without its mid block and its innermost stage."""
    if kind == "sdxl":
        return tiny_sdxl_unet()
    return prune(tiny_sd_unet(), PRUNED)[0].eval() if kind == "pruned" else tiny_sd_unet()


def trained(kind: str, alpha: float | None = None, seed: int = 0) -> UNet2DConditionModel:
    unet = add_lora(unet_of(kind), LoRA(rank=3, alpha=alpha, seed=seed))
    move(unet, SIZE, seed)
    return unet


def adapters_of(unet: UNet2DConditionModel, alpha: float | None = None) -> Adapters:
    return live_adapters(unet.state_dict(), alpha)


def output_of(unet: UNet2DConditionModel, **options: Any) -> Tensor:
    sdxl = unet.config.addition_embed_type is not None
    noisy = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        output: Tensor = unet.eval()(
            noisy, torch.tensor([999, 5]), **tiny_conditioning(2, sdxl=sdxl).unet_kwargs(), **options
        ).sample
    return output


def merged(kind: str, adapters: Adapters, scale: float = 1.0) -> UNet2DConditionModel:
    unet = unet_of(kind)
    add_to_weights(unet, adapters, scale)
    return unet


def pipeline_of(kind: str, folder: Path) -> Any:
    """A stock pipeline with the kind's U-Net."""
    if kind == "sdxl":
        return StableDiffusionXLPipeline.from_pretrained(save_tiny_sdxl(folder), add_watermarker=False)
    return StableDiffusionPipeline.from_pretrained(
        save_tiny_sd(folder), unet=unet_of(kind), safety_checker=None
    )


@pytest.mark.parametrize("kind", KINDS)
def test_adding_to_weights_is_merging_the_live_adapters(kind: str) -> None:
    unet = trained(kind, alpha=6.0)
    expected = merged_weights(unet, unet.state_dict())
    found = merged(kind, adapters_of(unet, 6.0)).state_dict()
    assert found.keys() == expected.keys()
    assert max(float((found[name] - expected[name]).abs().max()) for name in found) < 1e-6
    assert sum(not torch.equal(found[n], w) for n, w in unet_of(kind).state_dict().items()) == len(
        adapters_of(unet)
    )


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_read_as_it_was_written(kind: str, form: Any, tmp_path: Path) -> None:
    wanted = adapters_of(trained(kind, alpha=1.5), 1.5)
    write_lora(tmp_path, wanted, form, torch.float32)
    found = read_lora(tmp_path, unet_of(kind)).adapters
    assert found.keys() == wanted.keys()
    for name, update in wanted.items():
        torch.testing.assert_close(found[name].delta(), update.delta(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("kind", "form"), [("sd", "diffusers"), ("sdxl", "kohya"), ("pruned", "diffusers")])
def test_stock_pipelines_load_it_with_a_scale_and_another_lora(kind: str, form: Any, tmp_path: Path) -> None:
    first = adapters_of(trained(kind, alpha=6.0), 6.0)
    second = adapters_of(trained(kind, seed=1))
    for name, one in (("first", first), ("second", second)):
        (tmp_path / name).mkdir()
        write_lora(tmp_path / name, one, form, torch.float32)
    pipeline = pipeline_of(kind, tmp_path / "base")
    pipeline.unet.requires_grad_(
        False
    )  # as with adapters; torch rounds products by a weight that learns otherwise
    plain = output_of(pipeline.unet)
    pipeline.load_lora_weights(tmp_path / "first", adapter_name="first")
    pipeline.load_lora_weights(tmp_path / "second", adapter_name="second")
    pipeline.set_adapters(["first"], [1.0])
    torch.testing.assert_close(output_of(pipeline.unet), output_of(merged(kind, first)), rtol=1e-4, atol=1e-5)
    assert (output_of(pipeline.unet) - plain).abs().max() > 0.01
    pipeline.set_adapters(["first"], [0.5])
    torch.testing.assert_close(
        output_of(pipeline.unet), output_of(merged(kind, first, 0.5)), rtol=1e-4, atol=1e-5
    )
    pipeline.set_adapters(["first"], [0.0])
    assert torch.equal(output_of(pipeline.unet), plain)
    both = merged(kind, first)
    add_to_weights(both, second, 0.7)
    pipeline.set_adapters(["first", "second"], [1.0, 0.7])
    torch.testing.assert_close(output_of(pipeline.unet), output_of(both), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_it(kind: str, tmp_path: Path) -> None:
    adapters = adapters_of(trained(kind, alpha=6.0), 6.0)
    write_lora(tmp_path, adapters, "peft", torch.float32)
    found = PeftModel.from_pretrained(unet_of(kind), str(tmp_path))
    torch.testing.assert_close(
        output_of(found.base_model.model), output_of(merged(kind, adapters)), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("kind", ["sd", "pruned"])
def test_a_controlnet_and_a_lora_work_in_one_stock_pipeline(kind: str, tmp_path: Path) -> None:
    adapters = adapters_of(trained(kind))
    write_lora(tmp_path, adapters, dtype=torch.float32)
    controlnet = controlnet_from_unet(unet_of(kind), stem_widths=(8, 16))
    assert type(controlnet) is (ControlNetModel if kind == "sd" else StudentControlNet)
    generator = torch.Generator().manual_seed(3)
    for layer in (*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block):
        torch.nn.init.normal_(layer.weight, std=0.3, generator=generator)
    condition = torch.rand(1, 3, 32, 32, generator=generator)

    def images(unet: UNet2DConditionModel, scale: float, lora: float | None) -> Tensor:
        pipeline = StableDiffusionControlNetPipeline.from_pretrained(
            tmp_path / "base", unet=unet, controlnet=controlnet, safety_checker=None
        )
        if lora is not None:
            pipeline.load_lora_weights(tmp_path, adapter_name="style")
            pipeline.set_adapters(["style"], [lora])
        pipeline.set_progress_bar_config(disable=True)
        result: Tensor = pipeline(
            "a red circle",
            image=condition,
            num_inference_steps=1,
            guidance_scale=0,
            controlnet_conditioning_scale=scale,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).images
        return result

    save_tiny_sd(tmp_path / "base")
    both = images(unet_of(kind), 1.0, 1.0)
    torch.testing.assert_close(both, images(merged(kind, adapters), 1.0, None), rtol=1e-4, atol=1e-5)
    alone = images(unet_of(kind), 1.0, None)
    assert torch.equal(images(unet_of(kind), 1.0, 0.0), alone)
    styled = images(unet_of(kind), 0.0, 1.0)
    assert min(float((both - one).abs().max()) for one in (alone, styled)) > 1e-3


# --------------------------------------------------------------------------------------------------- files of others


def of_diffusers(unet: UNet2DConditionModel, folder: Path) -> None:
    """With the alpha in the header, as its training scripts write."""
    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=get_peft_model_state_dict(unet),
        unet_lora_adapter_metadata=unet.peft_config[ADAPTER].to_dict(),
    )


def of_old_diffusers(unet: UNet2DConditionModel, folder: Path) -> None:
    """Names of attention processors, as before PEFT; alpha is the rank there."""
    tensors = {}
    for name, update in live_adapters(unet.state_dict(), None).items():
        if ".attn" not in name:
            continue
        block, _, layer = name.partition(".to_")
        layer = layer.replace("out.0", "out")
        tensors[f"unet.{block}.processor.to_{layer}_lora.down.weight"] = update.down
        tensors[f"unet.{block}.processor.to_{layer}_lora.up.weight"] = update.up
    save_file(tensors, folder / DIFFUSERS_FILE)


def of_kohya(unet: UNet2DConditionModel, folder: Path) -> None:
    state = {f"unet.{name}": tensor for name, tensor in get_peft_model_state_dict(unet).items()}
    state |= {
        f"{name.rpartition('.lora_A')[0]}.alpha": torch.tensor(6.0) for name in state if ".lora_A." in name
    }
    converted = convert_state_dict_to_kohya({n: t for n, t in state.items() if not n.endswith("alpha")})
    converted |= {f"{name.split('.')[0]}.alpha": torch.tensor(6.0) for name in converted}
    save_file({name: tensor.contiguous() for name, tensor in converted.items()}, folder / "style.safetensors")


ALPHAS = {"conv1": 3, "down_blocks.0.resnets.0.conv1": 12, "ff.net.2": 12}
"""The first that fits counts."""


def of_peft(unet: UNet2DConditionModel, folder: Path) -> None:
    plain = unet_of("sdxl" if unet.config.addition_embed_type else "sd")
    config = LoraConfig(r=3, lora_alpha=6, target_modules=list(TARGETS), alpha_pattern=ALPHAS)
    model = PeftModel(plain, config)
    state = get_peft_model_state_dict(model)
    generator = torch.Generator().manual_seed(2)
    for name, tensor in model.named_parameters():
        if ".lora_B." in name:
            tensor.data = SIZE * torch.randn(tensor.shape, generator=generator)
    assert state
    model.save_pretrained(str(folder))
    save_file({"x": output_of(model.base_model.model)}, folder / "expected.st")


@pytest.mark.parametrize("writer", [of_diffusers, of_old_diffusers, of_kohya])
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_a_file_of_others_means_what_diffusers_reads_in_it(kind: str, writer: Any, tmp_path: Path) -> None:
    writer(trained(kind, alpha=6.0), tmp_path)
    pipeline = pipeline_of(kind, tmp_path / "base")
    file = next(tmp_path.glob("*.safetensors"))
    pipeline.load_lora_weights(tmp_path, weight_name=file.name)
    expected = output_of(pipeline.unet)
    found = output_of(merged(kind, read_lora(file, unet_of(kind)).adapters))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (expected - output_of(unet_of(kind))).abs().max() > 0.01


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_alphas_of_single_layers_in_pefts_config_count(kind: str, tmp_path: Path) -> None:
    of_peft(trained(kind), tmp_path)
    found = output_of(merged(kind, read_lora(tmp_path, unet_of(kind)).adapters))
    torch.testing.assert_close(found, load_file(tmp_path / "expected.st")["x"], rtol=1e-4, atol=1e-5)


SGM = {
    "down_blocks_0_resnets_0_conv1": "input_blocks_1_0_in_layers_2",
    "down_blocks_0_resnets_0_time_emb_proj": "input_blocks_1_0_emb_layers_1",
    "down_blocks_0_downsamplers_0_conv": "input_blocks_2_0_op",
    "down_blocks_1_attentions_0_proj_in": "input_blocks_3_1_proj_in",
    "down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_out_0": "input_blocks_3_1_transformer_blocks_0_attn2_to_out_0",
    "mid_block_attentions_0_transformer_blocks_0_ff_net_2": "middle_block_1_transformer_blocks_0_ff_net_2",
    "up_blocks_0_resnets_1_conv_shortcut": "output_blocks_1_0_skip_connection",
    "up_blocks_1_attentions_1_transformer_blocks_0_attn1_to_q": "output_blocks_3_1_transformer_blocks_0_attn1_to_q",
}
"""Some layers of a U-Net with one layer a stage, under diffusers' and under the original names, in kohya's spelling."""


def test_kohyas_names_of_the_original_unet_are_read(tmp_path: Path) -> None:
    adapters = {n: a for n, a in adapters_of(trained("sdxl")).items() if n.replace(".", "_") in SGM}
    assert len(adapters) == len(SGM)
    tensors = {}
    for name, update in adapters.items():
        original = f"lora_unet_{SGM[name.replace('.', '_')]}"
        tensors[f"{original}.lora_down.weight"], tensors[f"{original}.lora_up.weight"] = (
            update.down,
            update.up,
        )
        tensors[f"{original}.alpha"] = torch.tensor(1.5)
    for text in ("lora_te1", "lora_te2"):  # as most files of SDXL have them
        layer = f"{text}_text_model_encoder_layers_0_mlp_fc1"
        tensors |= {
            f"{layer}.lora_down.weight": torch.ones(3, 32),
            f"{layer}.lora_up.weight": torch.ones(64, 3),
        }
        tensors[f"{layer}.alpha"] = torch.tensor(3.0)
    save_file(tensors, tmp_path / "sgm.safetensors")
    found, text_layers = read_lora(tmp_path, unet_of("sdxl"))
    assert found.keys() == adapters.keys() and text_layers == 2
    for name, update in adapters.items():
        torch.testing.assert_close(found[name].delta(), update.delta() * 1.5 / 3)


def test_ranks_that_differ_by_layer_load_at_their_scale(tmp_path: Path) -> None:
    adapters = adapters_of(trained("sd"))
    for name in list(adapters)[::2]:
        adapters[name] = LowRank(adapters[name].down[:1], adapters[name].up[:, :1], 2.0)
    write_lora(tmp_path, adapters, "diffusers", torch.float32)
    with safe_open(tmp_path / DIFFUSERS_FILE, "pt") as file:
        settings = json.loads(file.metadata()["lora_adapter_metadata"])
    assert len(settings["unet.rank_pattern"]) == len(list(adapters)[::2])
    pipeline = pipeline_of("sd", tmp_path / "base")
    pipeline.load_lora_weights(tmp_path)
    torch.testing.assert_close(
        output_of(pipeline.unet), output_of(merged("sd", adapters)), rtol=1e-4, atol=1e-5
    )


def test_layers_of_text_encoders_are_counted_and_left_out(tmp_path: Path) -> None:
    write_lora(tmp_path, adapters_of(trained("sd")), "kohya", torch.float32)
    tensors = load_file(tmp_path / "lora.safetensors")
    name = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    tensors |= {f"{name}.lora_down.weight": torch.ones(3, 32), f"{name}.lora_up.weight": torch.ones(64, 3)}
    tensors[f"{name}.alpha"] = torch.tensor(3.0)
    save_file(tensors, tmp_path / "lora.safetensors")
    found = read_lora(tmp_path, unet_of("sd"))
    assert found.text_encoder_layers == 1 and found.adapters.keys() == adapters_of(trained("sd")).keys()


def released_layers() -> set[str]:
    """Layers of SDXS-512's U-Net in the 14 kinds that the released anime adapter has, spelled out from its topology.

    Three stages of one ResNet down, none in the middle, two up; transformers of depth 1 at the two deeper resolutions.
    """
    attention = [
        f"transformer_blocks.0.attn{i}.{part}"
        for i in (1, 2)
        for part in ("to_q", "to_k", "to_v", "to_out.0")
    ]
    transformer = [
        "proj_in",
        "proj_out",
        *attention,
        *(f"transformer_blocks.0.ff.net.{i}" for i in ("0.proj", "2")),
    ]
    resnet = ["conv1", "conv2", "time_emb_proj"]
    found = set()
    for stage, attends, widens in ((0, False, False), (1, True, True), (2, True, True)):
        place = f"down_blocks.{stage}"
        found |= {f"{place}.resnets.0.{one}" for one in [*resnet, *["conv_shortcut"] * widens]}
        found |= {f"{place}.attentions.0.{one}" for one in transformer * attends}
        found |= {f"{place}.downsamplers.0.conv"} if stage < 2 else set()
    for stage, attends in ((0, True), (1, True), (2, False)):
        place = f"up_blocks.{stage}"
        for i in (0, 1):  # every ResNet there takes a skip connection, so its input is wider than its output
            found |= {f"{place}.resnets.{i}.{one}" for one in [*resnet, "conv_shortcut"]}
            found |= {f"{place}.attentions.{i}.{one}" for one in transformer * attends}
        found |= {f"{place}.upsamplers.0.conv"} if stage < 2 else set()
    return found


def test_the_released_anime_adapter_has_this_layout(tmp_path: Path) -> None:
    """Rank 64 on 14 kinds of layers, 27.07 M weights, PEFT's names with `unet.` in front: what is known of the file."""
    config = {
        "block_out_channels": [320, 640, 1280, 1280],
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
        "sample_size": 64,
    }
    with torch.device("meta"):
        student = prune(UNet2DConditionModel(**config), PRESETS["sdxs-512"], transfer=False)[0]
        add_lora(student, LoRA())
    state = student.state_dict().items()
    weights = {name: torch.zeros(one.shape, dtype=torch.float16) for name, one in state if ADAPTER in name}
    adapters = live_adapters(weights, None)
    with safe_open(write_lora(tmp_path, adapters), "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    layers = released_layers()
    assert shapes.keys() == {f"unet.{layer}.lora_{side}.weight" for layer in layers for side in "AB"}
    kinds = {next(target for target in TARGETS if f".{layer}".endswith(f".{target}")) for layer in layers}
    assert len(kinds) == 14
    assert all(shape[0 if "lora_A" in name else 1] == 64 for name, shape in shapes.items())
    assert round(sum(math.prod(shape) for shape in shapes.values()) / 1e6, 2) == 27.07


# ------------------------------------------------------------------------------------------------------------- refusals


def broken(how: str, folder: Path) -> Path:
    """A LoRA that cannot be used."""
    path = write_lora(folder, adapters_of(trained("sd")), "diffusers", torch.float32)
    tensors = load_file(path)
    first = next(iter(tensors))
    if how == "pickle":
        return folder / "style.ckpt"
    if how == "missing":
        return folder / "none.safetensors"
    if how == "cut off":
        path.write_bytes(path.read_bytes()[:1000])
        return path
    if how == "two files":
        path.rename(folder / "a.safetensors")
        write_lora(folder, adapters_of(trained("sd")), "kohya")
        return folder
    if how == "empty folder":
        path.unlink()
        return folder
    if how == "other base":
        write_lora(folder, adapters_of(trained("sdxl")), "diffusers")
        return path
    if how == "half":
        del tensors[first]
    if how == "dora":
        tensors["unet.conv.dora_scale"] = torch.ones(3)
    if how == "nan":
        tensors[first][0] = torch.nan
    if how == "weights":
        tensors["unet.conv_in.weight"] = torch.ones(3)
    if how == "unknown layer":
        tensors["unet.down_blocks.7.conv.lora_A.weight"] = torch.ones(3)
    _break_numbers(how, tensors)
    save_file(tensors, path, HEADERS.get(how))
    return path


HEADERS = {
    how: {"lora_adapter_metadata": text}
    for how, text in {
        "header": "{",
        "header's list": "[1]",
        "header's alpha": '{"unet.lora_alpha": NaN}',
        "header's null": '{"unet.lora_alpha": null}',
        "header's pattern": '{"unet.lora_alpha": 4, "unet.alpha_pattern": {"(": 1}}',
        "header's patterns": '{"unet.lora_alpha": 4, "unet.alpha_pattern": [1]}',
        "header's zero": '{"unet.lora_alpha": 0}',
    }.items()
}


def _break_numbers(how: str, tensors: dict[str, Tensor]) -> None:
    first = next(name for name in tensors if ".lora_A." in name)
    second, layer = first.replace("lora_A", "lora_B"), first.removesuffix(".lora_A.weight")
    if how.startswith("alpha"):
        tensors[f"{layer}.alpha"] = {"nan": torch.tensor(torch.nan), "list": torch.ones(3)}[how.split()[1]]
    if how == "no rank":
        tensors[first], tensors[second] = tensors[first][:0], tensors[second][:, :0]
    if how == "other ranks":
        tensors[first] = tensors[first][:1]
    if how == "number":
        tensors[first] = torch.tensor(1.0)
    if how == "bytes":
        tensors[first] = tensors[first].to(torch.int8)
    if how == "zeros":
        tensors.update({name: one * 0 for name, one in tensors.items() if ".lora_B." in name})
    if how == "twice":
        kohya = f"lora_unet_{layer.removeprefix('unet.').replace('.', '_')}"
        tensors[f"{kohya}.lora_down.weight"] = tensors[first].clone()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("pickle", "is a pickle, which runs code"),
        ("missing", "there is no file or folder"),
        ("cut off", "cannot be read as safetensors"),
        ("two files", "a folder with a.safetensors, lora.safetensors; name one file"),
        ("empty folder", "a folder with no .safetensors file"),
        ("other base", "it was trained for another base"),
        ("half", "only one of the two matrices of"),
        ("dora", "is no plain LoRA"),
        ("nan", "hold NaN or infinity"),
        ("weights", "'unet.conv_in.weight', which is no part of a LoRA"),
        ("unknown layer", "1 layer\\(s\\) that this U-Net does not have, such as"),
        ("alpha nan", "alpha' is nan, and an alpha is one finite number"),
        ("alpha list", "alpha' is of shape \\(3,\\), and an alpha is one finite number"),
        ("no rank", "have no common rank of 1 or more"),
        ("other ranks", "have no common rank of 1 or more"),
        ("number", "have no common rank of 1 or more"),
        ("bytes", "torch.int8; a quantised LoRA cannot be read"),
        ("zeros", "changes nothing, since its matrices or alphas are 0"),
        ("twice", "under two names"),
        ("header", "header whose lora_adapter_metadata is not readable as JSON"),
        ("header's list", "lora_adapter_metadata is no JSON object"),
        ("header's alpha", "'lora_alpha' is nan"),
        ("header's null", "'lora_alpha' is None"),
        ("header's zero", "changes nothing"),
        ("header's pattern", "alpha_pattern cannot be read"),
        ("header's patterns", "alpha_pattern cannot be read"),
    ],
)
def test_what_cannot_be_used_is_refused(how: str, message: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        read_lora(broken(how, tmp_path), unet_of("sd"), "style.path")
    assert "style.path" in str(error.value)


def test_a_value_that_float16_cannot_hold_is_not_written(tmp_path: Path) -> None:
    adapters = {n: a._replace(up=a.up * 1e6) for n, a in adapters_of(trained("sd")).items()}
    with pytest.raises(UserError, match="write float32 instead"):
        write_lora(tmp_path, adapters)


# ----------------------------------------------------------------------------------------------------------- extraction


def test_extraction_finds_the_lora_that_was_merged() -> None:
    wanted = adapters_of(trained("sd"))
    found = extract_lora(unet_of("sd"), merged("sd", wanted), 3, TARGETS)
    assert found.adapters.keys() == wanted.keys() and found.left_out == 0
    assert found.share == pytest.approx(1.0, abs=1e-6)
    for name, update in wanted.items():
        torch.testing.assert_close(found.adapters[name].delta(), update.delta(), rtol=1e-3, atol=1e-5)


def test_extraction_is_the_best_of_its_rank_and_reports_what_is_lost() -> None:
    base, tuned = unet_of("sd"), unet_of("sd")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    found = extract_lora(base, tuned, 2, TARGETS)
    total, kept = 0.0, 0.0
    for name, update in found.adapters.items():
        change = tuned.get_submodule(name).weight - base.get_submodule(name).weight
        values = torch.linalg.svdvals(change.detach().double().flatten(1))
        total, kept = total + float(values.square().sum()), kept + float(values[:2].square().sum())
        lost = (change.detach().double() - update.delta()).square().sum()
        assert float(lost) == pytest.approx(float(values[2:].square().sum()), rel=0.02)
    assert found.share == pytest.approx(kept / total, rel=0.01) and found.share < 0.9
    assert found.left_out == len(list(tuned.parameters())) - len(found.adapters)


def test_extraction_refuses_what_has_no_difference() -> None:
    with pytest.raises(ValueError, match="different layers"):
        extract_lora(unet_of("sd"), unet_of("pruned"), 2, TARGETS)
    with pytest.raises(ValueError, match="do not differ"):
        extract_lora(unet_of("sd"), unet_of("sd"), 2, TARGETS)
    with pytest.raises(ValueError, match="do not differ"):  # but for rounding
        extract_lora(unet_of("sd").half(), unet_of("sd"), 2, TARGETS)
    broken = unet_of("sd")
    broken.get_submodule("down_blocks.0.resnets.0.conv1").weight.data[0] = torch.nan
    with pytest.raises(ValueError, match="down_blocks.0.resnets.0.conv1.weight holds NaN or infinity"):
        extract_lora(unet_of("sd"), broken, 2, TARGETS)


def test_the_files_have_the_names_that_readers_look_for(tmp_path: Path) -> None:
    adapters = adapters_of(trained("sd"))
    sizes = set()
    for form in FORMATS:
        (tmp_path / form).mkdir()
        path = write_lora(tmp_path / form, adapters, form)  # type: ignore[arg-type]
        tensors = {n: t for n, t in load_file(path).items() if not n.endswith("alpha")}
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
        sizes.add(sum(tensor.numel() for tensor in tensors.values()))
    assert sizes == {parameter_count(adapters)}
    config = json.loads((tmp_path / "peft" / PEFT_CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], len(config["target_modules"])) == (3, 3, len(adapters))
