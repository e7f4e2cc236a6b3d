"""Topologies: parameter counts of the presets, refusals, and YAML files."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import ArgumentParser

from evaluation.benchmarks.full_size import sd15_unet_config, sd21_unet_config, sdxl_unet_config
from sdxs_lightning.surgery.anatomy import anatomy_of
from sdxs_lightning.surgery.config import meta_unet, prune_config
from sdxs_lightning.surgery.presets import PRESETS, topology_of
from sdxs_lightning.surgery.selection import choose_blocks
from sdxs_lightning.surgery.topology import Stage, Topology, read_topology
from tests.helpers.teachers import CONFIGS, PAIRS, SD, SDXL

FULL_SIZE = {"sd15": sd15_unet_config(), "sd21": sd21_unet_config(), "sdxl": sdxl_unet_config()}

COUNTS = [
    # The released files: sdxs-512-dreamshaper has 315.75 M, sdxs-512-0.9 328.18 M, Vega 745.2 M; the paper says 319 M.
    ("sd21", "sdxs-512", 318_695_364),
    ("sd15", "sdxs-512", 315_746_244),
    ("sd21", "sdxs-512-0.9", 328_177_284),
    ("sdxl", "sdxs-1024", 745_225_604),
    ("sdxl", "vega", 745_225_604),
    # Papers: BK-SDM 0.58, 0.49 and 0.33 B; KOALA 782 M; SSD-1B 1.3 B.
    ("sd15", "bk-base", 579_384_964),
    ("sd21", "bk-base", 583_480_964),
    ("sd15", "bk-small", 482_346_884),
    ("sd21", "bk-small", 485_787_524),
    ("sd15", "bk-tiny", 323_384_964),
    ("sd21", "bk-tiny", 326_825_604),
    ("sdxl", "koala-700m", 782_822_724),
    ("sdxl", "ssd-1b", 1_331_334_404),
]


def count(config: dict[str, Any]) -> int:
    return sum(parameter.numel() for parameter in meta_unet(config).parameters())


@pytest.mark.parametrize(
    ("base", "parameters"), [("sd15", 859_520_964), ("sd21", 865_910_724), ("sdxl", 2_567_463_684)]
)
def test_the_bases_have_their_published_size(base: str, parameters: int) -> None:
    assert count(FULL_SIZE[base]) == parameters


@pytest.mark.parametrize(("base", "preset", "parameters"), COUNTS)
def test_a_preset_has_its_published_size(base: str, preset: str, parameters: int) -> None:
    assert count(prune_config(FULL_SIZE[base], topology_of(preset))) == parameters


def test_every_preset_is_counted_and_says_where_it_is_from() -> None:
    assert {preset for _, preset, _ in COUNTS} == {preset for _, preset in PAIRS} | {"vega"} == set(PRESETS)
    assert replace(PRESETS["sdxs-1024"], name="vega", note="") == replace(PRESETS["vega"], note="")
    assert all(topology.name == name and topology.note for name, topology in PRESETS.items())
    # The counts in the notes are those of this test.
    for _, preset, parameters in COUNTS:
        assert f"{parameters:,}" in PRESETS[preset].note


def test_sdxs_512_is_the_config_of_the_released_file() -> None:
    config = prune_config(sd21_unet_config(), topology_of("sdxs-512"))
    expected = {
        "block_out_channels": [320, 640, 1280],
        "layers_per_block": 1,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "mid_block_type": None,
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "cross_attention_dim": 1024,
        "attention_head_dim": [5, 10, 20],
        "use_linear_projection": True,
        "transformer_layers_per_block": 1,
        "reverse_transformer_layers_per_block": None,
        "only_cross_attention": False,
        "sample_size": 64,
    }
    assert {name: config[name] for name in expected} == expected
    released = prune_config(sd21_unet_config(), topology_of("sdxs-512-0.9"))
    assert released["attention_head_dim"] == [8, 8, 8]
    assert released["only_cross_attention"] == [True, False, False]


def test_the_depths_of_ssd_1b_and_vega_are_those_of_the_released_files() -> None:
    ssd = prune_config(sdxl_unet_config(), topology_of("ssd-1b"))
    assert ssd["transformer_layers_per_block"] == [1, 2, 4]
    assert ssd["reverse_transformer_layers_per_block"] == [[4, 4, 10], [2, 1, 1], 1]
    vega = prune_config(sdxl_unet_config(), topology_of("vega"))
    assert (vega["transformer_layers_per_block"], vega["mid_block_type"]) == ([1, 1, 2], "UNetMidBlock2D")
    assert vega["reverse_transformer_layers_per_block"] is None


@pytest.mark.parametrize("kind", CONFIGS)
def test_keeping_everything_keeps_the_config(kind: str) -> None:
    pruned = prune_config(CONFIGS[kind], Topology())
    assert {name: pruned[name] for name in CONFIGS[kind]} == CONFIGS[kind]
    # Metadata of a file is not an argument of the class.
    assert prune_config(pruned | {"_class_name": "UNet2DConditionModel"}, Topology()) == pruned


def test_settings_that_a_teacher_gives_for_each_stage_lose_the_removed_one() -> None:
    listed = ("cross_attention_dim", "layers_per_block", "transformer_layers_per_block", "attention_head_dim")
    defaults = SD | {"transformer_layers_per_block": 1}
    pruned = prune_config(SD | {name: [defaults[name]] * 4 for name in listed}, PRESETS["bk-tiny"])
    assert [pruned[name] for name in listed] == [[32] * 3, [1] * 3, [1] * 3, [2] * 3]
    assert count(pruned) == count(prune_config(SD, PRESETS["bk-tiny"]))


@pytest.mark.parametrize(("kind", "preset"), PAIRS)
def test_a_pruned_u_net_contains_itself(kind: str, preset: str) -> None:
    pruned = prune_config(CONFIGS[kind], topology_of(preset))
    assert prune_config(pruned, topology_of(preset)) == pruned
    # Asking for what is there already, and saying nothing, are the same.
    assert anatomy_of(pruned) == anatomy_of(prune_config(pruned, Topology()))


def test_blocks_are_chosen_evenly_and_the_first_is_kept() -> None:
    assert choose_blocks(10, 2, "spaced") == ((0,), (5,))
    assert choose_blocks(10, 4, "spaced") == ((0,), (2,), (5,), (7,))
    assert choose_blocks(10, 4, "first") == ((0,), (1,), (2,), (3,))
    assert choose_blocks(10, 4, "mean") == ((0, 1), (2, 3, 4), (5, 6), (7, 8, 9))
    assert choose_blocks(3, 3, "mean") == choose_blocks(3, 3, "spaced") == ((0,), (1,), (2,))
    assert choose_blocks(2, 0, "mean") == ()


_BK = PRESETS["bk-tiny"]


@pytest.mark.parametrize(
    ("config", "topology", "message"),
    [
        (
            SD,
            PRESETS["sdxs-1024"],
            "'sdxs-1024' is for a U-Net with added conditioning 'text_time' .*, and this one has 'none'",
        ),
        (
            SDXL,
            PRESETS["bk-tiny"],
            "'bk-tiny' is for a U-Net with added conditioning 'none' .*has 'text_time'",
        ),
        (
            SDXL,
            replace(PRESETS["bk-base"], added_conditioning="any"),
            "'bk-base' keeps 4 stages, and this U-Net has 3",
        ),
        (
            SD,
            replace(PRESETS["vega"], added_conditioning="any"),
            r"stages\[2\].down_depths asks for .* 2 block.* this U-Net has 1",
        ),
        (prune_config(SD, _BK), PRESETS["bk-small"], "'bk-small' keeps 4 stages, and this U-Net has 3"),
        (
            prune_config(SD, PRESETS["bk-small"]),
            PRESETS["bk-base"],
            "'bk-base' keeps the mid block 'full', and this U-Net's is 'none'",
        ),
        (
            prune_config(SDXL, PRESETS["vega"]),
            PRESETS["koala-700m"],
            r"stages\[1\].down_depths asks for a Transformer of 2 block\(s\) where this U-Net has 1",
        ),
        (
            prune_config(SD, PRESETS["sdxs-512"]),
            _BK,
            None,  # says nothing of depths: contained
        ),
        (SD, Topology(stages=(Stage(down_layers=(0,)),)), "keeps 1 down and 3 up"),
        (SD, Topology(stages=(Stage(down_layers=(1,), up_layers=(0, 2)),)), "must begin with layer 0"),
        (SD, Topology(stages=(Stage(down_layers=(0,), up_layers=(0, 1)),)), r"must end with the last layer"),
        (SD, Topology(stages=(Stage(down_layers=(0, 2)),)), r"among the teacher's 2 layers, got \[0, 2\]"),
        (SD, Topology(stages=(Stage(down_layers=(0, 0)),)), r"and rise; got \[0, 0\]"),
        (SD, Topology(stages=(Stage(up_depths=(1, 1)),)), "one for each of the 3 kept layers"),
        (SD, Topology(stages=(Stage(attention_heads=3),)), "must divide the width 8, got 3"),
        (SD, Topology(stages=(Stage(), Stage())), "mid block, which is 32 channels wide, on a stage of 16"),
        (
            SD | {"only_cross_attention": True},
            Topology(stages=(Stage(only_cross_attention=False),), mid_block="none"),
            "no self-attention to copy",
        ),
        (SD | {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, Topology(), "knows no mid block"),
        (SD | {"down_block_types": ["KDownBlock2D"] * 4}, Topology(), "knows no block 'KDownBlock2D'"),
    ],
)
def test_what_a_teacher_does_not_contain_is_refused(
    config: dict[str, Any], topology: Topology, message: str | None
) -> None:
    if message is None:
        assert prune_config(config, topology)["down_block_types"][0] == "DownBlock2D"
        return
    with pytest.raises(ValueError, match=message) as refusal:
        prune_config(config, topology)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"down_layers": ()}, "down_layers must keep at least one layer"),
        ({"down_depths": -1}, "down_depths must be 0 or more, got -1"),
        ({"up_depths": (0, 1, 1)}, r"0 for all layers of a stage or for none, got \[0, 1, 1\]"),
        ({"attention_heads": 0}, "attention_heads must be 1 or more"),
    ],
)
def test_an_impossible_stage_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Stage(**fields)


def test_a_student_without_stages_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one stage"):
        Topology(stages=())


def test_presets_are_found_by_name() -> None:
    own = Topology(name="mine")
    assert topology_of("bk-tiny") is PRESETS["bk-tiny"]
    assert topology_of(own) is own
    with pytest.raises(ValueError, match=r"no preset 'bk-huge'; there are sdxs-512, .*bk-tiny"):
        topology_of("bk-huge")


YAML = """
stages:
  - {down_layers: [0], up_layers: [0, -1], down_depths: 0, up_depths: 0}
  - {down_layers: [0], up_layers: [0, -1]}
  - {down_layers: [0], up_layers: [0, -1]}
mid_block: none
"""


def test_a_topology_file_says_what_a_preset_says(tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(YAML)
    topology = read_topology(path)
    expected = PRESETS["sdxs-512"]
    assert topology == replace(expected, added_conditioning="any", name="small", note="")
    path.write_text("topology:" + YAML.replace("\n", "\n  ") + "\n  name: mine\n")
    assert read_topology(path) == replace(topology, name="mine")


def test_the_manual_has_every_field_and_its_example_is_the_preset(tmp_path: Path) -> None:
    manual = (Path(__file__).parents[2] / "sdxs_lightning" / "surgery" / "README.md").read_text()
    for field in (*fields(Topology), *fields(Stage)):
        assert re.search(rf"^\|.*`{field.name}`.*\|", manual, re.MULTILINE), field.name
    path = tmp_path / "sdxs-512.yaml"
    path.write_text(manual.split("```yaml\n")[1].split("```")[0])
    preset = PRESETS["sdxs-512"]
    assert read_topology(path) == replace(preset, added_conditioning="any", note="")


def test_a_training_configuration_takes_a_topology_or_the_name_of_a_preset() -> None:
    parser = ArgumentParser(parser_mode="omegaconf+", exit_on_error=False)
    parser.add_argument("--topology", type=str | Topology)
    written = {
        "stages": [{"down_layers": [0], "up_layers": [0, -1], "up_depths": [1, 1]}],
        "mid_block": "none",
    }
    parsed = parser.instantiate(parser.parse_object({"topology": written})).topology
    stage = Stage(down_layers=(0,), up_layers=(0, -1), up_depths=(1, 1))
    assert parsed == Topology(stages=(stage,), mid_block="none")
    assert parser.parse_object({"topology": "bk-tiny"}).topology == "bk-tiny"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stags: 3", "the topology has no field 'stags'; it has stages, mid_block"),
        ("stages: [{}, {down_layer: [0]}]", r"stages\[1\] has no field 'down_layer'; it has down_layers"),
        (
            "stages: [{down_depths: true}]",
            r"stages\[0\]: down_depths is True, but an integer or a list of",
        ),
        ("stages: [{up_layers: [0, x]}]", r"up_layers is \[0, 'x'\], but a list of an integer or null"),
        ("stages: [{down_depths: -1}]", r"stages\[0\]: down_depths must be 0 or more, got -1"),
        ("stages: 3", "stages is 3, but a list of stages or null is accepted"),
        ("stages: []", "must keep at least one stage"),
        ("mid_block: half", "mid_block is 'half', but full, resnet, none or null is accepted"),
        ("- 3", r"must be fields with values, got \[3\]"),
        ("stages: [", "is not valid YAML"),
    ],
)
def test_a_wrong_topology_file_is_refused_in_one_sentence(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as refusal:
        read_topology(path)
    assert str(refusal.value).startswith(f"'{path}'") and "\n" not in str(refusal.value)


def test_a_missing_topology_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape(f"no topology file '{tmp_path / 'none.yaml'}'")):
        read_topology(tmp_path / "none.yaml")
