"""The pruned U-Net: its values, and its output against teachers in which the removed parts do nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from evaluation.benchmarks.full_size import sd15_unet_config, sdxl_unet_config
from sdxs_lightning.networks.feature_taps import FeatureTap
from sdxs_lightning.surgery.feature_pairs import feature_pairs
from sdxs_lightning.surgery.key_map import key_map
from sdxs_lightning.surgery.presets import PRESETS, topology_of
from sdxs_lightning.surgery.pruning import prune
from sdxs_lightning.surgery.topology import Stage, Topology
from tests.helpers.teachers import CONFIGS, PAIRS, SD, SD2, SDXL, full_size_inputs, load, make_teacher, run

SHRINKING = SD | {
    "block_out_channels": [8, 16, 32],
    "down_block_types": SD["down_block_types"][1:],
    "up_block_types": SD["up_block_types"][:3],
}
"""A teacher whose innermost stage is wider than the one before, as in the toy base."""

TWO_STAGES = Topology(stages=(Stage(), Stage()), mid_block="none")


# What makes a part of a network do nothing: x + 0 is exactly x.


@torch.no_grad()
def silence_resnet(resnet: ResnetBlock2D) -> None:
    """Lets the hidden channels through: the residual is 0, and a shortcut reads only the first channels."""
    nn.init.zeros_(resnet.conv2.weight)
    nn.init.zeros_(resnet.conv2.bias)
    if resnet.conv_shortcut is not None:
        nn.init.zeros_(resnet.conv_shortcut.weight)
        nn.init.zeros_(resnet.conv_shortcut.bias)
        resnet.conv_shortcut.weight[:, : resnet.out_channels, 0, 0] = torch.eye(resnet.out_channels)


def silence_transformer(transformer: Transformer2DModel) -> None:
    nn.init.zeros_(transformer.proj_out.weight)
    nn.init.zeros_(transformer.proj_out.bias)


def silence_block(block: BasicTransformerBlock) -> None:
    for layer in (block.attn1.to_out[0], block.attn2.to_out[0], block.ff.net[2]):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


def silence_layer(stage: Any, layer: int) -> None:
    silence_resnet(stage.resnets[layer])
    if hasattr(stage, "attentions"):
        silence_transformer(stage.attentions[layer])


def silence_mid(teacher: UNet2DConditionModel, keep_first: bool = False) -> None:
    for resnet in teacher.mid_block.resnets[1 if keep_first else 0 :]:
        silence_resnet(resnet)
    silence_transformer(teacher.mid_block.attentions[0])


def silence_half(teacher: UNet2DConditionModel) -> None:
    """The second layer of each down stage and the middle one of each up stage."""
    for stage in (*teacher.down_blocks, *teacher.up_blocks):
        silence_layer(stage, 1)


@contextmanager
def without_inner_stage(teacher: UNet2DConditionModel) -> Iterator[None]:
    """The second up stage reads what the last but one down stage made, before its downsampler."""
    made: list[Tensor] = []
    down = teacher.down_blocks[-2].register_forward_hook(
        lambda block, args, output: made.append(output[1][-2])
    )
    up = teacher.up_blocks[1].register_forward_pre_hook(
        lambda block, args, kwargs: (args, kwargs | {"hidden_states": made[-1]}), with_kwargs=True
    )
    yield
    down.remove()
    up.remove()


def test_removing_nothing_changes_nothing() -> None:
    for config in CONFIGS.values():
        teacher = make_teacher(config)
        student, report = prune(teacher, Topology())
        assert torch.equal(run(student), run(teacher))
        assert report.student_parameters == report.teacher_parameters and not report.dropped


@pytest.mark.parametrize("config", [SD, SD2], ids=["sd", "sd2"])
def test_bk_base_is_a_teacher_whose_second_layers_do_nothing(config: dict[str, Any]) -> None:
    teacher = make_teacher(config)
    before = run(teacher)
    silence_half(teacher)
    assert not torch.allclose(run(teacher), before, atol=1e-2)
    student, _ = prune(teacher, PRESETS["bk-base"])
    torch.testing.assert_close(run(student), run(teacher), rtol=0, atol=1e-6)


def test_bk_small_is_a_teacher_whose_middle_does_nothing_either() -> None:
    teacher = make_teacher(SD)
    silence_half(teacher)
    silence_mid(teacher)
    student, _ = prune(teacher, PRESETS["bk-small"])
    torch.testing.assert_close(run(student), run(teacher), rtol=0, atol=1e-6)


@pytest.mark.parametrize("preset", ["bk-tiny", "sdxs-512"])
def test_without_the_inner_stage_the_next_one_reads_the_skip(preset: str) -> None:
    teacher = make_teacher(SD2)
    silence_half(teacher)
    if preset == "sdxs-512":
        for stage in (teacher.down_blocks[0], teacher.up_blocks[-1]):
            for transformer in stage.attentions:
                silence_transformer(transformer)
    student, _ = prune(teacher, PRESETS[preset])
    with without_inner_stage(teacher):
        expected = run(teacher)
    torch.testing.assert_close(run(student), expected, rtol=0, atol=1e-6)
    assert not torch.allclose(run(student), run(teacher), atol=1e-2)


@pytest.mark.parametrize("preset", ["sdxs-1024", "ssd-1b"])
def test_a_shallower_transformer_is_one_whose_other_blocks_do_nothing(preset: str) -> None:
    teacher = make_teacher(SDXL)
    kept = {key for source in key_map(SDXL, PRESETS[preset]).values() for key in source.keys}
    for name, module in teacher.named_modules():
        if isinstance(module, BasicTransformerBlock) and f"{name}.norm1.weight" not in kept:
            silence_block(module)
    silence_mid(teacher, keep_first=True)
    student, _ = prune(teacher, PRESETS[preset])
    torch.testing.assert_close(run(student), run(teacher), rtol=0, atol=1e-6)


def test_cross_attention_only_equals_a_teacher_built_so() -> None:
    teacher = make_teacher(SD2)
    stage = Stage(only_cross_attention=True)
    student, report = prune(teacher, Topology(stages=(stage, Stage(), Stage(), Stage())))
    for side in (teacher.down_blocks[0], teacher.up_blocks[-1]):
        for transformer in side.attentions:
            block = transformer.transformer_blocks[0]
            block.attn1, block.norm1, block.only_cross_attention = block.attn2, block.norm2, True
    assert torch.equal(run(student), run(teacher))
    assert all(".norm1." in name or ".attn1." in name for name in report.dropped)


@pytest.mark.parametrize(("kind", "preset"), PAIRS)
def test_a_preset_copies_runs_and_loads(kind: str, preset: str, tmp_path: Path) -> None:
    teacher = make_teacher(CONFIGS[kind])
    topology = topology_of(preset)
    student, report = prune(teacher, topology)
    weights, copies = teacher.state_dict(), student.state_dict()
    for key, source in key_map(CONFIGS[kind], topology).items():
        assert torch.equal(copies[key], weights[source.keys[0]]), key
    assert not student.training
    assert report.student_parameters == sum(parameter.numel() for parameter in student.parameters())
    output = run(student)
    assert output.shape == (1, 4, 16, 16) and output.isfinite().all()
    student.save_pretrained(tmp_path / "unet", safe_serialization=True)
    loaded = load(tmp_path / "unet")
    assert torch.equal(run(loaded), output)
    # What was loaded has the same topology, and can be pruned to it again.
    again, report = prune(loaded, topology)
    assert torch.equal(run(again), output) and not report.dropped


def test_pruning_leaves_the_teacher_alone() -> None:
    teacher = make_teacher(SD)
    before = {key: tensor.clone() for key, tensor in teacher.state_dict().items()}
    student, _ = prune(teacher, PRESETS["sdxs-512"])
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    assert all(torch.equal(tensor, before[key]) for key, tensor in teacher.state_dict().items())


def test_progressive_removal_ends_where_one_removal_does() -> None:
    teacher = make_teacher(SD)
    student = teacher
    for preset in ("bk-base", "bk-small", "bk-tiny", "sdxs-512"):
        student, _ = prune(student, PRESETS[preset])
    direct, _ = prune(teacher, PRESETS["sdxs-512"])
    assert dict(student.config) == dict(direct.config)
    assert torch.equal(run(student), run(direct))
    xl, _ = prune(prune(make_teacher(SDXL), PRESETS["ssd-1b"])[0], PRESETS["vega"])
    assert xl.config.transformer_layers_per_block == [1, 1, 2]
    # SSD-1B kept 0, 2, 5, 7 of ten blocks; the first and the third of those are SDXL's 0 and 5, as in Vega made directly ...
    straight = prune(make_teacher(SDXL), PRESETS["vega"])[0].state_dict()
    key = "up_blocks.0.attentions.{}.transformer_blocks.1.attn1.to_q.weight"
    assert all(
        torch.equal(xl.state_dict()[key.format(layer)], straight[key.format(layer)]) for layer in range(3)
    )


def test_means_of_neighbouring_blocks() -> None:
    teacher = make_teacher(SDXL)
    student, report = prune(teacher, replace(PRESETS["vega"], transformer_blocks="mean"))
    key = "down_blocks.2.attentions.0.transformer_blocks.{}.attn2.to_v.weight"
    weights = teacher.state_dict()
    for k, numbers in enumerate([range(5), range(5, 10)]):
        mean = sum(weights[key.format(number)] for number in numbers) / 5
        torch.testing.assert_close(student.state_dict()[key.format(k)], mean)
    assert key.format(0) in report.averaged and not report.new
    assert not any(".transformer_blocks." in name for name in report.dropped if "mid" not in name)
    half = make_teacher(SDXL).to(torch.bfloat16)
    rough, _ = prune(half, replace(PRESETS["vega"], transformer_blocks="mean"))
    assert rough.dtype == torch.bfloat16
    exact = torch.stack([half.state_dict()[key.format(number)].float() for number in range(5)]).mean(0)
    assert torch.equal(rough.state_dict()[key.format(0)], exact.bfloat16())


def test_where_the_removed_stage_was_wider_the_skip_columns_are_copied() -> None:
    teacher = make_teacher(SHRINKING)
    student, report = prune(teacher, TWO_STAGES)
    fresh, _ = prune(teacher, TWO_STAGES, transfer=False)
    ours, theirs, new = student.state_dict(), teacher.state_dict(), fresh.state_dict()
    first = "up_blocks.0.resnets.0"
    changed = [f"{first}.norm1.weight", f"{first}.norm1.bias", f"{first}.conv1.weight"]
    changed.append(f"{first}.conv_shortcut.weight")
    assert sorted(report.partly_new) == sorted(changed) and not report.new and not report.averaged
    for key in changed:
        tensor, teacher_tensor = ours[key], theirs[key.replace("up_blocks.0", "up_blocks.1")]
        axis = 1 if tensor.ndim > 1 else 0
        # 16 hidden and 16 skip channels in the student, 32 and 16 in the teacher.
        assert (tensor.shape[axis], teacher_tensor.shape[axis]) == (32, 48)
        assert torch.equal(tensor.narrow(axis, 16, 16), teacher_tensor.narrow(axis, 32, 16))
        assert torch.equal(tensor.narrow(axis, 0, 16), new[key].narrow(axis, 0, 16))
    assert "partly new: up_blocks.0.resnets.0.norm1" in str(report)
    assert run(student).isfinite().all()


def test_without_transfer_it_is_the_same_network_with_fresh_weights() -> None:
    teacher = make_teacher(SD)
    pruned, _ = prune(teacher, PRESETS["bk-tiny"])
    fresh, report = prune(teacher, PRESETS["bk-tiny"], transfer=False, seed=3)
    assert dict(fresh.config) == dict(pruned.config)
    assert len(report.new) == len(fresh.state_dict()) and not report.copied and not report.used
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        expected = UNet2DConditionModel(**{k: v for k, v in fresh.config.items() if not k.startswith("_")})
    assert all(torch.equal(tensor, fresh.state_dict()[key]) for key, tensor in expected.state_dict().items())
    other, _ = prune(teacher, PRESETS["bk-tiny"], transfer=False, seed=4)
    assert not torch.equal(other.conv_in.weight, fresh.conv_in.weight)


def test_pruning_leaves_the_random_state_alone() -> None:
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    prune(make_teacher(SHRINKING), TWO_STAGES)
    assert torch.equal(torch.randn(3), expected)


def test_bk_tiny_is_tapped_where_bk_sdm_taps_it() -> None:
    # METHOD: teacher down_blocks.0, .1, down_blocks.2.attentions.1.proj_out, up_blocks.1/2/3.
    assert feature_pairs(sd15_unet_config(), PRESETS["bk-tiny"]) == {
        "down_blocks.0": "down_blocks.0",
        "down_blocks.1": "down_blocks.1",
        "down_blocks.2.attentions.0.proj_out": "down_blocks.2.attentions.1.proj_out",
        "up_blocks.0": "up_blocks.1",
        "up_blocks.1": "up_blocks.2",
        "up_blocks.2": "up_blocks.3",
    }
    assert list(feature_pairs(sdxl_unet_config(), PRESETS["vega"])) == [
        *("down_blocks.0", "down_blocks.1", "down_blocks.2", "mid_block"),
        *("up_blocks.0", "up_blocks.1", "up_blocks.2"),
    ]


PLAIN_INSIDE = Topology(stages=(Stage(), Stage(down_depths=0)), mid_block="none", name="plain inside")


@pytest.mark.parametrize(
    ("config", "topology"),
    [
        *((CONFIGS[kind], topology_of(preset)) for kind, preset in PAIRS),
        (SHRINKING, TWO_STAGES),
        (SHRINKING, PLAIN_INSIDE),
        (
            SHRINKING | {"down_block_types": ["DownBlock2D"] * 3, "up_block_types": ["UpBlock2D"] * 3},
            TWO_STAGES,
        ),
    ],
)
def test_tapped_features_of_a_pair_have_one_shape(config: dict[str, Any], topology: Topology) -> None:
    teacher = make_teacher(config)
    student, _ = prune(teacher, topology)
    pairs = feature_pairs(config, topology)
    with FeatureTap(teacher, *pairs.values()) as theirs, FeatureTap(student, *pairs) as ours:
        run(teacher)
        run(student)
    for name, teacher_name in pairs.items():
        assert ours[name].shape == theirs[teacher_name].shape, name
    # The way down is the same computation up to the first thing removed.
    assert torch.isfinite(torch.cat([ours[name].flatten() for name in pairs])).all()


def test_taps_of_nothing_removed_are_equal() -> None:
    teacher = make_teacher(SD2)
    student, _ = prune(teacher, Topology())
    pairs = feature_pairs(SD2, Topology())
    with FeatureTap(teacher, *pairs.values()) as theirs, FeatureTap(student, *pairs) as ours:
        run(teacher)
        run(student)
    assert len(pairs) == 9 and all(torch.equal(ours[name], theirs[other]) for name, other in pairs.items())


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("config", "preset", "parameters"),
    [(sd15_unet_config(), "sdxs-512", 315_746_244), (sdxl_unet_config(), "sdxs-1024", 745_225_604)],
    ids=["sd15", "sdxl"],
)
def test_a_full_size_base_is_pruned_runs_and_loads(
    config: dict[str, Any], preset: str, parameters: int, tmp_path: Path
) -> None:
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        try:
            teacher = UNet2DConditionModel(**config).eval()
        finally:
            torch.set_default_dtype(torch.float32)
    student, report = prune(teacher, PRESETS[preset])
    assert report.student_parameters == parameters
    del teacher
    inputs = full_size_inputs(student)
    output = run(student, **inputs)
    assert output.shape == inputs["sample"].shape and output.isfinite().all()
    student.save_pretrained(tmp_path / "unet", safe_serialization=True)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path / "unet", torch_dtype=torch.bfloat16).to("cuda")
    assert torch.equal(run(loaded, **inputs), output)
