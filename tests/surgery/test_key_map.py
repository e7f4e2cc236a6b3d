"""The key map against BK-SDM's as data, and the account of every tensor."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from evaluation.benchmarks.full_size import sd15_unet_config
from sdxs_lightning.surgery.config import prune_config, shapes_of
from sdxs_lightning.surgery.key_map import TensorSource, key_map
from sdxs_lightning.surgery.presets import PRESETS, topology_of
from sdxs_lightning.surgery.pruning import prune, transfer_report
from sdxs_lightning.surgery.report import TransferReport, account, outermost
from sdxs_lightning.surgery.topology import Topology
from tests.helpers.teachers import CONFIGS, PAIRS, SD, SD2, SDXL, make_teacher

# BK-SDM's block removal (arXiv:2305.15798, figure 3 and its released weights): the student's block, the teacher's. Blocks
# that are not named have the teacher's name.
BK_TINY_RENAMED = {
    "up_blocks.0.resnets.0": "up_blocks.1.resnets.0",
    "up_blocks.0.resnets.1": "up_blocks.1.resnets.2",
    "up_blocks.0.attentions.0": "up_blocks.1.attentions.0",
    "up_blocks.0.attentions.1": "up_blocks.1.attentions.2",
    "up_blocks.0.upsamplers.0": "up_blocks.1.upsamplers.0",
    "up_blocks.1.resnets.0": "up_blocks.2.resnets.0",
    "up_blocks.1.resnets.1": "up_blocks.2.resnets.2",
    "up_blocks.1.attentions.0": "up_blocks.2.attentions.0",
    "up_blocks.1.attentions.1": "up_blocks.2.attentions.2",
    "up_blocks.1.upsamplers.0": "up_blocks.2.upsamplers.0",
    "up_blocks.2.resnets.0": "up_blocks.3.resnets.0",
    "up_blocks.2.resnets.1": "up_blocks.3.resnets.2",
    "up_blocks.2.attentions.0": "up_blocks.3.attentions.0",
    "up_blocks.2.attentions.1": "up_blocks.3.attentions.2",
}
BK_BASE_RENAMED = {
    f"up_blocks.{i}.{part}.1": f"up_blocks.{i}.{part}.2"
    for i in range(4)
    for part in ("resnets", "attentions")
}


def renamed(key: str, renames: dict[str, str]) -> str:
    for name, teacher_name in renames.items():
        if key.startswith(name + "."):
            return teacher_name + key.removeprefix(name)
    return key


@pytest.mark.parametrize("config", [sd15_unet_config(), SD, SD2], ids=["sd15", "tiny", "tiny-sd2"])
@pytest.mark.parametrize(
    ("preset", "renames"),
    [("bk-tiny", BK_TINY_RENAMED), ("bk-small", BK_BASE_RENAMED), ("bk-base", BK_BASE_RENAMED)],
)
def test_the_map_is_bk_sdm_s(config: dict[str, Any], preset: str, renames: dict[str, str]) -> None:
    sources = key_map(config, PRESETS[preset])
    assert sources == {key: TensorSource((renamed(key, renames),)) for key in sources}
    # One to one: no tensor of the teacher is used twice.
    assert len({source.keys for source in sources.values()}) == len(sources)


def test_spot_values_of_sdxs_512() -> None:
    sources = key_map(sd15_unet_config(), PRESETS["sdxs-512"])
    assert len(sources) == 280
    for key, teacher_key in {
        "conv_in.weight": "conv_in.weight",
        "time_embedding.linear_2.bias": "time_embedding.linear_2.bias",
        "down_blocks.0.resnets.0.conv1.weight": "down_blocks.0.resnets.0.conv1.weight",
        "down_blocks.1.downsamplers.0.conv.weight": "down_blocks.1.downsamplers.0.conv.weight",
        "up_blocks.0.resnets.1.conv_shortcut.weight": "up_blocks.1.resnets.2.conv_shortcut.weight",
        "up_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k.weight": (
            "up_blocks.1.attentions.2.transformer_blocks.0.attn2.to_k.weight"
        ),
        "up_blocks.2.resnets.1.norm1.weight": "up_blocks.3.resnets.2.norm1.weight",
        "conv_norm_out.weight": "conv_norm_out.weight",
    }.items():
        assert sources[key] == TensorSource((teacher_key,))
    assert not [key for key in sources if key.startswith(("down_blocks.0.att", "up_blocks.2.att", "mid"))]


def test_vega_takes_every_fifth_block_of_ten_and_the_first_of_two() -> None:
    sources = key_map(SDXL, PRESETS["sdxs-1024"])
    for key, teacher_key in {
        "down_blocks.2.attentions.1.transformer_blocks.0": "down_blocks.2.attentions.1.transformer_blocks.0",
        "down_blocks.2.attentions.1.transformer_blocks.1": "down_blocks.2.attentions.1.transformer_blocks.5",
        "up_blocks.0.attentions.2.transformer_blocks.1": "up_blocks.0.attentions.2.transformer_blocks.5",
        "up_blocks.1.attentions.1.transformer_blocks.0": "up_blocks.1.attentions.1.transformer_blocks.0",
    }.items():
        assert sources[f"{key}.ff.net.2.weight"] == TensorSource((f"{teacher_key}.ff.net.2.weight",))


def test_ssd_1b_keeps_all_ten_blocks_of_the_last_layer() -> None:
    sources = key_map(SDXL, PRESETS["ssd-1b"])
    prefix = "up_blocks.0.attentions.2.transformer_blocks"
    assert all(
        sources[f"{prefix}.{k}.norm1.bias"] == TensorSource((f"{prefix}.{k}.norm1.bias",)) for k in range(10)
    )
    assert f"{prefix.replace('attentions.2', 'attentions.1')}.4.norm1.bias" not in sources


def test_cross_attention_only_starts_from_the_second_attention() -> None:
    sources = key_map(SD2, PRESETS["sdxs-512-0.9"])
    for side, teacher_side in (
        ("down_blocks.0.attentions.0", "down_blocks.0.attentions.0"),
        ("up_blocks.2.attentions.1", "up_blocks.3.attentions.2"),
    ):
        for part, teacher_part in {
            "norm1.weight": "norm2.weight",
            "attn1.to_k.weight": "attn2.to_k.weight",
            "attn1.to_out.0.bias": "attn2.to_out.0.bias",
            "attn2.to_k.weight": "attn2.to_k.weight",
            "norm2.weight": "norm2.weight",
            "norm3.weight": "norm3.weight",
        }.items():
            expected = TensorSource((f"{teacher_side}.transformer_blocks.0.{teacher_part}",))
            assert sources[f"{side}.transformer_blocks.0.{part}"] == expected
    # Only that stage.
    key = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k.weight"
    assert sources[key] == TensorSource((key,))


@pytest.mark.parametrize(("kind", "preset"), PAIRS)
def test_every_tensor_is_accounted_for(kind: str, preset: str) -> None:
    config, topology = CONFIGS[kind], topology_of(preset)
    report = transfer_report(config, topology)
    sources = key_map(config, topology, [*report.copied, *report.averaged, *report.partly_new, *report.new])
    assert sources.keys() == shapes_of(prune_config(config, topology)).keys()
    # The presets need nothing that the teacher does not have.
    assert not report.averaged and not report.partly_new and not report.new
    teacher = shapes_of(config)
    assert {*report.used, *report.dropped} == set(teacher)
    assert not report.used.keys() & report.dropped.keys()
    assert report.used.keys() == {key for source in sources.values() for key in source.keys}
    assert report.teacher_parameters == sum(shape.numel() for shape in teacher.values())


@pytest.mark.parametrize("kind", CONFIGS)
def test_keeping_everything_maps_each_tensor_to_itself(kind: str) -> None:
    sources = key_map(CONFIGS[kind], Topology())
    assert sources == {key: TensorSource((key,)) for key in shapes_of(CONFIGS[kind])}


SHAPES = {"a.weight": torch.Size([4, 3]), "b.weight": torch.Size([4])}


def checked(
    sources: dict[str, TensorSource], removable: tuple[str, ...] = ("b",), **teacher: Any
) -> TransferReport:
    return account("test", sources, {"a.weight": torch.Size([4, 3])}, teacher or SHAPES, removable)


def test_the_report_refuses_by_name() -> None:
    fine = {"a.weight": TensorSource(("a.weight",))}
    assert checked(fine).dropped == {"b.weight": 4}
    with pytest.raises(ValueError, match=r"teacher's tensor 'b.weight' is not accounted for.*'test'"):
        checked(fine, removable=())
    with pytest.raises(ValueError, match=r"do not agree on the tensor 'a.weight'"):
        checked({})
    with pytest.raises(ValueError, match=r"do not agree on the tensor 'c.weight' \(1 in all\)"):
        checked({**fine, "c.weight": TensorSource()})
    with pytest.raises(
        ValueError, match=r"'a.weight' comes from 'x.weight', which the teacher does not have"
    ):
        checked({"a.weight": TensorSource(("x.weight",))})
    with pytest.raises(ValueError, match=r"'a.weight' is \[4, 3\] and the teacher's 'b.weight' \[4\]"):
        checked({"a.weight": TensorSource(("b.weight",))}, removable=("a",))
    with pytest.raises(ValueError, match=r"'b.weight' \[4\]: they do not fit"):
        checked({"a.weight": TensorSource(("a.weight", "b.weight"))})


def test_the_report_refuses_missing_columns() -> None:
    source = {"a.weight": TensorSource(("a.weight",), last_columns=2)}
    student = {"a.weight": torch.Size([4, 3])}
    assert account("test", source, student, {"a.weight": torch.Size([4, 9])}, ()).partly_new == {
        "a.weight": 12
    }
    for shape in ([4, 1], [5, 3], [4, 3, 1]):
        with pytest.raises(ValueError, match="they do not fit"):
            account("test", source, student, {"a.weight": torch.Size(shape)}, ())


def test_an_unknown_tensor_of_the_teacher_is_named() -> None:
    teacher = make_teacher(SD)
    teacher.position_net = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"'position_net.weight' is not accounted for.*'bk-tiny'"):
        prune(teacher, PRESETS["bk-tiny"])


def test_a_tensor_of_another_shape_is_named() -> None:
    teacher = make_teacher(SD)
    teacher.up_blocks[3].resnets[2].conv1 = torch.nn.Conv2d(3, 8, 3)
    with pytest.raises(
        ValueError, match=r"'up_blocks.2.resnets.1.conv1.weight' is \[8, 16, 3, 3\] and the teacher's "
    ):
        prune(teacher, PRESETS["bk-tiny"])


def test_the_report_reads_well() -> None:
    lines = str(transfer_report(sd15_unet_config(), PRESETS["bk-tiny"])).splitlines()
    assert lines[0] == "bk-tiny: 323,384,964 parameters, 37.6% of the teacher's 859,520,964"
    assert lines[1].split() == ["copied", "358", "tensors", "323,384,964", "parameters"]
    assert lines[4].split() == ["new", "0", "tensors", "0", "parameters"]
    assert lines[5].split() == ["dropped", "328", "tensors", "536,136,000", "parameters"]
    dropped = [line.removeprefix("  dropped: ") for line in lines[6:]]
    assert {"mid_block", "down_blocks.3", "down_blocks.2.downsamplers", "up_blocks.0"} <= set(dropped)
    assert "up_blocks.1.attentions.1" in dropped and "up_blocks.1.resnets.1" in dropped


def test_numbered_siblings_are_joined() -> None:
    names = ["a.blocks.0.w", "a.blocks.1.w", "a.blocks.1.b", "a.blocks.3.w", "b.w", "c"]
    assert outermost(names[1:5], names) == ["a.blocks.{1,3}", "b"]
    assert outermost(names, names) == ["a", "b", "c"]
    assert outermost(["a.blocks.0.w"], names) == ["a.blocks.0"]
