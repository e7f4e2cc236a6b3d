"""`python -m sdxs_lightning.lora`: merge, extract, convert."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file

from sdxs_lightning.lora import main
from sdxs_lightning.networks.lora_files import add_to_weights, write_lora
from tests.helpers.tiny import save_tiny_sd
from tests.networks.test_lora_files import adapters_of, merged, output_of, trained


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two LoRAs."""
    folder = tmp_path_factory.mktemp("lora")
    save_tiny_sd(folder / "base")
    for name, seed in (("one", 0), ("two", 1)):
        (folder / name).mkdir()
        write_lora(folder / name, adapters_of(trained("sd", seed=seed)), dtype=torch.float32)
    (folder / "huge").mkdir()
    huge = {name: one._replace(up=one.up * 1e6) for name, one in adapters_of(trained("sd")).items()}
    write_lora(folder / "huge", huge, dtype=torch.float32)
    return folder


def call(world: Path, *arguments: object) -> None:
    main([str(argument) for argument in arguments])


def test_two_loras_merge_into_a_pipeline(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "styled"
    loras = world / "one", world / "two"
    call(
        world,
        "merge",
        "--model",
        world / "base",
        "--lora",
        *loras,
        "--scale",
        1,
        0.5,
        "--out",
        out,
        "--dtype",
        "float32",
    )
    said = capsys.readouterr().out
    assert "scale 0.5" in said and f"written to {out} in float32" in said
    found = StableDiffusionPipeline.from_pretrained(out, safety_checker=None)
    expected = merged("sd", adapters_of(trained("sd")))
    add_to_weights(expected, adapters_of(trained("sd", seed=1)), 0.5)
    torch.testing.assert_close(output_of(found.unet), output_of(expected), rtol=1e-5, atol=1e-6)


def test_merge_then_extract_gives_the_lora_back(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merge = ["merge", "--lora", world / "one", "--dtype", "float32"]
    call(world, *merge, "--model", world / "base" / "unet", "--out", tmp_path / "unet")
    assert (tmp_path / "unet" / "config.json").is_file()
    extract = [
        "extract",
        "--base",
        world / "base",
        "--tuned",
        tmp_path / "unet",
        "--rank",
        3,
        "--dtype",
        "float32",
    ]
    call(world, *extract, "--out", tmp_path / "again")
    assert "100.0% of the squared difference" in capsys.readouterr().out
    unet = StableDiffusionPipeline.from_pretrained(world / "base", safety_checker=None)
    unet.load_lora_weights(tmp_path / "again")
    wanted = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    torch.testing.assert_close(output_of(unet.unet), output_of(wanted), rtol=1e-3, atol=1e-4)


def test_an_absurd_rank_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["extract", "--base", "x", "--tuned", "y", "--rank", "10000000", "--out", str(tmp_path / "new")])
    said = capsys.readouterr().err
    assert "--rank" in said and "1280" in said and "10000000" in said and said.count("\n") == 1


def test_a_file_is_converted(world: Path, tmp_path: Path) -> None:
    convert = ["convert", "--lora", world / "one", "--model", world / "base", "--format", "kohya"]
    call(world, *convert, "--out", tmp_path / "kohya")
    names = load_file(tmp_path / "kohya" / "lora.safetensors")
    assert "lora_unet_down_blocks_1_attentions_0_proj_in.lora_down.weight" in names


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scale", "1", "2", "3", "--out", "{new}"], "--scale has 3 values for 1 LoRAs"),
        (["--out", "{base}"], "exists and is not empty"),
        (["--out", "{base}/new"], "is inside of --model"),
        (["--out", "{new}", "--lora", "{huge}"], "has NaN, or values that float16 cannot hold"),
        (["--lora", "none.safetensors", "--out", "{new}"], "--lora: there is no file or folder"),
        (["--model", "none", "--out", "{new}"], "--model 'none' is neither a U-Net folder"),
    ],
)
def test_refusals_are_one_sentence(
    world: Path, arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    usual = [] if "--lora" in arguments else ["--lora", "{one}"]
    given = ["--model", "{base}", *usual, *arguments]
    places = {name: world / name for name in ("base", "one", "huge")} | {"new": tmp_path / "new"}
    with pytest.raises(SystemExit) as end:
        main(["merge", *(one.format(**places) for one in given)])
    said = capsys.readouterr().err
    assert end.value.code == 2 and message in said and said.count("\n") == 1
    assert not (tmp_path / "new").exists() and not (world / "base" / "new").exists()
