"""`python -m sdxs_lightning.prune`: what it writes, and its one-sentence refusals."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from sdxs_lightning import prune as command
from sdxs_lightning.families.sd import StableDiffusion
from sdxs_lightning.surgery.presets import PRESETS
from sdxs_lightning.surgery.pruning import prune, transfer_report
from sdxs_lightning.surgery.topology import Topology
from tests.helpers.teachers import SD, load, make_teacher, run
from tests.helpers.tiny import save_tiny_sd

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "unet"
    make_teacher(SD).save_pretrained(folder, safe_serialization=True)
    return folder


def refused(arguments: Sequence[object], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    with pytest.raises(SystemExit) as end:
        command.main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    assert (end.value.code, printed.out) == (code, "")
    assert printed.err.startswith("prune: ") and printed.err.count("\n") == 1
    return printed.err


def test_it_writes_the_pruned_u_net(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "made" / "bk-tiny"
    command.main(["--base", str(base), "--preset", "bk-tiny", "--output", str(output)])
    printed = capsys.readouterr().out
    expected, report = prune(load(base), PRESETS["bk-tiny"])
    assert torch.equal(run(load(output)), run(expected))
    assert printed == f"{report}\nwritten to {output} in float32\n"
    assert sorted(path.name for path in output.iterdir()) == ["config.json", WEIGHTS]
    assert list(output.parent.iterdir()) == [output]
    # It is a base for the next.
    command.main(["--base", str(output), "--preset", "sdxs-512", "--output", str(tmp_path / "next")])
    assert torch.equal(run(load(tmp_path / "next")), run(prune(load(base), PRESETS["sdxs-512"])[0]))


def test_float16_files_and_fresh_weights(base: Path, tmp_path: Path) -> None:
    arguments = ["--base", str(base), "--preset", "bk-tiny", "--output"]
    command.main([*arguments, str(tmp_path / "half"), "--dtype", "float16"])
    half = load_file(tmp_path / "half" / WEIGHTS)
    assert {tensor.dtype for tensor in half.values()} == {torch.float16}
    assert torch.equal(half["conv_in.weight"], load(base).conv_in.weight.half())
    command.main([*arguments, str(tmp_path / "fresh"), "--fresh", "--seed", "3"])
    expected, _ = prune(load(base), PRESETS["bk-tiny"], transfer=False, seed=3)
    assert torch.equal(load(tmp_path / "fresh").conv_in.weight, expected.conv_in.weight)


def test_a_student_starts_from_the_folder(tmp_path: Path) -> None:
    base = save_tiny_sd(tmp_path / "base")
    topology = tmp_path / "no_middle.yaml"
    topology.write_text("mid_block: none\n")
    output = tmp_path / "student"
    command.main(["--base", str(base), "--topology", str(topology), "--output", str(output)])
    student = StableDiffusion(str(base)).load_unet(str(output))
    assert student.mid_block is None and student.config.layers_per_block == 1
    expected, _ = prune(load(base / "unet"), Topology(mid_block="none"))
    assert all(
        torch.equal(tensor, expected.state_dict()[key]) for key, tensor in student.state_dict().items()
    )


def test_a_dry_run_reads_no_weights(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(base / "config.json", tmp_path / "config.json")
    command.main(["--base", str(tmp_path), "--preset", "bk-small", "--dry_run"])
    assert capsys.readouterr().out == f"{transfer_report(SD, PRESETS['bk-small'])}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_wrong_options_are_refused_in_one_sentence(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = ["--output", tmp_path / "out"]
    assert "'sdxs-1024' is for a U-Net with added conditioning 'text_time'" in refused(
        ["--base", base, "--preset", "sdxs-1024", *output], capsys
    )
    assert "--preset is 'bk-huge', but must be one of sdxs-512, " in refused(
        ["--base", base, "--preset", "bk-huge", *output], capsys
    )
    assert "no topology file" in refused(
        ["--base", base, "--topology", tmp_path / "none.yaml", *output], capsys
    )
    for base_folder in (tmp_path, tmp_path / "none"):
        message = refused(["--base", base_folder, "--preset", "bk-tiny", *output], capsys)
        assert f"--base '{base_folder}' is neither a U-Net folder" in message
    assert "give either --preset or --topology, got neither" in refused(["--base", base, *output], capsys)
    both = ["--preset", "bk-tiny", "--topology", tmp_path / "none.yaml"]
    assert "give either --preset or --topology, got both" in refused(["--base", base, *both, *output], capsys)
    assert not (tmp_path / "out").exists()


def test_an_output_that_exists_is_left_alone(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    arguments = ["--base", base, "--preset", "bk-tiny", "--output"]
    assert "exists and is not empty" in refused([*arguments, tmp_path], capsys)
    assert "exists and is not empty" in refused([*arguments, tmp_path / "notes.txt"], capsys)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    command.main([str(argument) for argument in [*arguments, tmp_path / "empty"]])
    assert (tmp_path / "empty" / WEIGHTS).is_file()


def test_a_disk_that_refuses_leaves_nothing(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    arguments = ["--base", base, "--preset", "bk-tiny", "--output"]
    printed = refused([*arguments, tmp_path / "file" / "out"], capsys, code=4)
    assert (
        "could not be written: not a directory" in printed or "could not be written: file exists" in printed
    )


def test_an_interrupted_writing_leaves_nothing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(unet: UNet2DConditionModel, folder: Path, **settings: object) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(UNet2DConditionModel, "save_pretrained", full)
    arguments = ["--base", base, "--preset", "bk-tiny", "--output", tmp_path / "out"]
    assert "could not be written: no space left on device" in refused(arguments, capsys, code=4)
    assert list(tmp_path.iterdir()) == []


def test_an_unusable_base_is_refused_in_one_sentence(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--preset",
        "bk-tiny",
        "--output",
        tmp_path / "out",
        "--base",
        tmp_path / "b",
    ]
    broken = tmp_path / "b"
    shutil.copytree(base, broken)
    weights, config = broken / WEIGHTS, broken / "config.json"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "cannot be loaded" in refused(arguments, capsys)
    weights.rename(broken / "diffusion_pytorch_model.bin")
    assert "has only pickled weights" in refused(arguments, capsys)
    (broken / "diffusion_pytorch_model.bin").unlink()
    assert "has no weights: expected diffusion_pytorch_model.safetensors" in refused(arguments, capsys)
    shutil.copy(base / WEIGHTS, weights)
    content = json.loads(config.read_text())
    config.write_text(json.dumps(content | {"mid_block_type": None}))
    assert "that the network in its config.json lacks, such as mid_block" in refused(arguments, capsys)
    config.write_text(json.dumps(content | {"_class_name": "AutoencoderKL"}))
    assert "holds a AutoencoderKL, expected a UNet2DConditionModel" in refused(arguments, capsys)
    config.write_text("{")
    assert "not readable as JSON" in refused(arguments, capsys)
    assert not (tmp_path / "out").exists()


def test_half_precision_files_of_a_hub_folder_are_read(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "unet"
    load(base).half().save_pretrained(folder, variant="fp16", safe_serialization=True)
    command.main(["--base", str(tmp_path), "--preset", "bk-tiny", "--output", str(tmp_path / "out")])
    assert torch.equal(load(tmp_path / "out").conv_in.weight, load(base).conv_in.weight.half().float())


def test_help_shows_examples_and_every_preset(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        command.main(["--help"])
    printed = capsys.readouterr().out
    assert end.value.code == 0 and "--preset sdxs-512 --output" in printed
    assert all(f"  {name} " in printed and preset.note in printed for name, preset in PRESETS.items())


def test_a_missing_output_is_refused(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--base", str(base), "--preset", "bk-tiny"]
    assert refused(arguments, capsys) == "prune: --output is required without --dry_run.\n"


def test_help_and_refusals_do_not_import_torch(tmp_path: Path) -> None:
    script = """
import sys
from sdxs_lightning.prune import main
for arguments in (["--help"], ["--bass", "x"], ["--base", "x", "--topology", "none.yaml", "--output", "out"]):
    try:
        main(arguments)
    except SystemExit as end:
        print(end.code, file=sys.stderr)
heavy = {"torch", "diffusers", "transformers", "lightning"} & sys.modules.keys()
sys.exit(f"imported {heavy}" if heavy else 0)
"""
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert [line for line in lines if line.isdigit()] == ["0", "2", "2"]
    assert "did you mean --base?" in done.stderr and "there is no topology file 'none.yaml'" in done.stderr
