"""`python -m data.prepare pairs`: what it writes, how it resumes, and what it refuses."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import signal
from pathlib import Path

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from data.prepare.__main__ import main
from data.prepare.common.progress import CommandProgress
from data.prepare.pairs.prompts import open_prompts
from data.shards.datamodule import ShardDataModule
from data.shards.writer import ShardWriter, encode_latents
from data.toy.world import captions
from sdxs_lightning.core.batch import TrainingBatch
from sdxs_lightning.core.pair_noise import noise_seeds, pair_noise
from tests.helpers.preparing import killed_in_its_second_shard, refused
from tests.helpers.ranks.processes import PRELOAD
from tests.helpers.tiny import LATENT_SHAPE, RESOLUTION_PX, save_tiny_sd, save_tiny_sdxl

# Of numpy's, inside diffusers.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

LINES = ["a red circle", "a small blue square", "a green cat above a dog", "the white star", "a photo"]
SCALING_FACTOR = 0.5  # of the tiny VAE


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {
        "sd": save_tiny_sd(folder / "sd", "v_prediction"),
        "other": save_tiny_sd(folder / "other", "v_prediction", seed=1),
        "sdxl": save_tiny_sdxl(folder / "sdxl"),
    }


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("\n".join([*LINES[:2], "", *LINES[2:], "  "]), encoding="utf-8-sig")
    return file


def arguments(base: Path, prompts: Path | str, out: Path, *more: object) -> list[str]:
    """11 pairs in shards of 4, batches of 3; later options override earlier ones."""
    fixed = ["--steps", 2, "--guidance_scale", 2, "--samples_per_shard", 4, "--batch_size", 3, "--seed", 5]
    named = ["--model", base, "--captions", prompts, "--count", 11, "--out", out]
    return [str(one) for one in ("pairs", *named, "--device", "cpu", "--processes", "1", *fixed, *more)]


def tars(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}


def read(folder: Path, count: int = 11) -> TrainingBatch:
    data = ShardDataModule(
        str(folder), 4, contents=["latents", "noise_seeds", "sizes"], shuffle_window_shards=0
    )
    data.setup()
    assert data.dataset is not None
    return data.dataset.batch(range(count))


@pytest.fixture(scope="module")
def made(bases: dict[str, Path], prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of one process."""
    out = tmp_path_factory.mktemp("sets") / "made"
    main(arguments(bases["sd"], prompts, out))
    return out


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_pairs_are_the_stock_pipelines(
    bases: dict[str, Path], prompts: Path, tmp_path: Path, kind: str
) -> None:
    out = tmp_path / "set"
    main(arguments(bases[kind], prompts, out, "--scheduler", "EulerDiscreteScheduler", "--count", 7))
    batch = read(out, 7)
    assert batch.captions == [LINES[i % 5] for i in range(7)]
    assert batch.sample_ids == [f"{i // 4:05d}/{i:09d}" for i in range(7)]
    assert batch.latents is not None and batch.pair_noise_seeds is not None
    assert torch.equal(batch.pair_noise_seeds, noise_seeds(5, torch.arange(7)))
    assert batch.original_sizes is not None and batch.crops is not None
    assert batch.original_sizes.unique().tolist() == [RESOLUTION_PX] and batch.crops.unique().tolist() == [0]
    pipeline = (StableDiffusionXLPipeline if kind == "sdxl" else StableDiffusionPipeline).from_pretrained(
        bases[kind]
    )
    pipeline.scheduler = EulerDiscreteScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing"
    )
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        batch.captions,
        num_inference_steps=2,
        guidance_scale=2.0,
        latents=pair_noise(batch.pair_noise_seeds, LATENT_SHAPE),
        output_type="latent",
    ).images
    scale = float(expected.std())
    torch.testing.assert_close(batch.latents * SCALING_FACTOR / scale, expected / scale, rtol=2e-3, atol=2e-3)


def test_a_killed_run_resumes_to_the_same_shards_in_several_processes(
    bases: dict[str, Path], prompts: Path, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "set"
    command = arguments(bases["sd"], prompts, out)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOAD, "data.prepare.__main__"])
    run = context.Process(target=killed_in_its_second_shard, args=(command, out))
    run.start()
    run.join(120)
    assert run.exitcode == -signal.SIGKILL
    assert list(tars(out)) == ["00000.tar"] and len(list(out.glob(".making-*/*.tar.partial"))) == 1
    before = (out / "00000.tar").stat().st_mtime_ns
    # The second of two parts first: it leaves the rest to the other.
    main([*command, "--part", "1/2"])
    assert "7 pairs sampled" not in capsys.readouterr().out and list(tars(out)) == ["00000.tar", "00001.tar"]
    main([*command, "--processes", "2"])
    assert tars(out) == tars(made) and len(tars(out)) == 3
    assert (out / "00000.tar").stat().st_mtime_ns == before and not list(out.glob(".making-*"))
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["pairs"], summary["shards"], summary["made"]) == (11, 3, 3)


def test_a_complete_set_is_only_verified(
    bases: dict[str, Path], prompts: Path, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tars(made)
    main(arguments(bases["sd"], prompts, made, "--verify", 20))
    output = capsys.readouterr().out
    assert output.startswith("0 pairs sampled in ") and "; 11 sampled again, largest difference 0;" in output
    assert f"{made} holds 11 pairs in 3 shards, scaled latents of mean" in output
    summary = json.loads((made / "summary.json").read_text())
    assert summary["verified"] == list(range(11)) and summary["largest_difference"] == 0
    assert summary["settings"]["guidance"] == 2 and summary["settings"]["seed"] == 5
    batch = read(made)
    assert batch.latents is not None
    scaled = batch.latents * SCALING_FACTOR
    assert summary["latents_std"] == pytest.approx(float(scaled.std()), rel=1e-4)
    assert tars(made) == before


def test_another_batch_size_differs_by_rounding_only(
    bases: dict[str, Path], prompts: Path, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(arguments(bases["sd"], prompts, made, "--verify", 11, "--batch_size", 1))
    assert "11 sampled again" in capsys.readouterr().out


def test_a_pair_that_differs_is_detected(
    bases: dict[str, Path], prompts: Path, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "set"
    command = arguments(bases["sd"], prompts, out)
    main(command)
    first, second = out / "00000.tar", out / "00001.tar"
    contents = first.read_bytes(), second.read_bytes()
    first.write_bytes(contents[1])
    second.write_bytes(contents[0])
    output = refused([*command, "--verify", "11"], capsys)
    assert "pair 0 of" in output and f"should have 'a red circle' and {5 * 2**32}" in output
    second.write_bytes(contents[1])
    batch = read(made)
    assert batch.latents is not None
    with ShardWriter(tmp_path / "forged") as writer:
        for index in range(4):
            sizes = {"original_height": 32, "original_width": 32, "crop_top": 0, "crop_left": 0}
            latents = batch.latents[index] + (0.1 if index == 2 else 0)
            writer.write(
                {
                    "latent.safetensors": encode_latents(latents),
                    "txt": LINES[index],
                    "json": {"noise_seed": 5 * 2**32 + index, **sizes},
                },
                key=f"{index:09d}",
            )
    first.write_bytes((tmp_path / "forged" / "00000.tar").read_bytes())
    assert "pair 2 of" in refused([*command, "--verify", "11"], capsys)
    first.write_bytes(contents[0][: len(contents[0]) // 2])
    assert "Remove that shard and run the same command again." in refused(command, capsys)
    first.unlink()
    main([*command, "--verify", "11"])
    assert tars(out) == tars(made)


def test_another_unet_than_the_models(
    bases: dict[str, Path], prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fewer = ["--count", 2, "--batch_size", 2]
    main(arguments(bases["sd"], prompts, tmp_path / "one", "--unet", bases["other"], *fewer))
    main(arguments(bases["sd"], prompts, tmp_path / "two", "--unet", bases["other"] / "unet", *fewer))
    main(arguments(bases["sd"], prompts, tmp_path / "three", *fewer))
    assert tars(tmp_path / "one") == tars(tmp_path / "two") != tars(tmp_path / "three")
    command = arguments(bases["sd"], prompts, tmp_path / "four", "--unet", bases["sdxl"], *fewer)
    assert "reads prompts of width 48" in refused(command, capsys)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--steps", 3], "was started with steps 2 and this command says 3: give what it was started with"),
        (["--guidance_scale", 3], "was started with guidance 2.0 and this command says 3.0"),
        (["--seed", 6], "was started with seed 5 and this command says 6"),
        (["--count", 12], "was started with count 11"),
        (["--scheduler", "UniPCMultistepScheduler"], "was started with scheduler None"),
        (["--captions", "toy:train"], "was started with captions_fingerprint"),
        (["--dtype", "float16"], "was started with dtype 'float32' and this command says 'float16'"),
        (["--samples_per_shard", 5], "was started with samples_per_shard 4"),
    ],
)
def test_a_set_is_not_resumed_with_other_settings(
    bases: dict[str, Path],
    prompts: Path,
    made: Path,
    capsys: pytest.CaptureFixture[str],
    changed: list[object],
    message: str,
) -> None:
    before = tars(made)
    assert message in refused(arguments(bases["sd"], prompts, made, *changed), capsys)
    assert tars(made) == before


def test_another_model_is_detected_by_its_weights(
    bases: dict[str, Path], prompts: Path, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = refused(arguments(bases["other"], prompts, made), capsys)
    assert "was started with model_fingerprint" in output


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--model", "nowhere"], "--model: StableDiffusion: there is no folder 'nowhere'"),
        (
            ["--scheduler", "LCMScheduler"],
            "--scheduler is 'LCMScheduler', but must be one of ddim, DDIMScheduler,",
        ),
        # 4 latents of 16 x 16 in float16 and five blocks of tar are 4,608 bytes.
        (["--count", 2**31 - 1], "2,147,483,647 pairs of at least 4.61 kB each need 9.9 TB, and '"),
        (
            ["--count", 2**31 - 1, "--part", "0/2"],
            "1,073,741,824 pairs of at least 4.61 kB each need 4.95 TB",
        ),
        (["--captions", "toy:tarin"], "it has toy:train, toy:val, toy:test"),
        (["--captions", "nothing.txt"], "--captions 'nothing.txt': There is no shard or folder"),
        (["--captions", "EMPTY"], "holds no prompt; write one per line"),
        (["--captions", "BYTES"], "cannot be read as UTF-8 text"),
        (["--captions", "TABLE"], "each of its lines would be a prompt, brackets and commas too"),
        (["--captions", "ZEROS"], "holds zero bytes, which a damaged file does and no text"),
        (["--unet", "nowhere"], "--unet 'nowhere' is neither"),
    ],
)
def test_bad_inputs_are_refused(
    bases: dict[str, Path],
    prompts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changed: list[object],
    message: str,
) -> None:
    empty, latin = tmp_path / "empty.txt", tmp_path / "latin.txt"
    empty.write_text("\n \n")
    latin.write_bytes(b"caf\xe9")
    table, zeros = tmp_path / "prompts.json", tmp_path / "zeros.txt"
    table.write_text('[\n"a dog",\n"a cat"\n]')
    zeros.write_bytes(b"a dog\n" + bytes(512))
    files = {"EMPTY": empty, "BYTES": latin, "TABLE": table, "ZEROS": zeros}
    changed = [files.get(str(one), one) for one in changed]
    assert message in refused(arguments(bases["sd"], prompts, tmp_path / "set", *changed), capsys)
    assert not (tmp_path / "set").exists()


def test_foreign_shards_and_endless_prompts_are_refused(
    bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with ShardWriter(tmp_path / "foreign") as writer:
        writer.write({"txt": "a"})
    output = refused(arguments(bases["sd"], "toy:train", tmp_path / "foreign"), capsys)
    assert "holds shards but no pairs.json" in output
    endless = arguments(bases["sd"], "toy:train", tmp_path / "set")
    del endless[endless.index("--count") : endless.index("--count") + 2]
    assert "--count is needed with --captions toy:train, which has no end" in refused(endless, capsys)


@pytest.mark.parametrize("processes", [1, 2])
def test_latents_that_are_not_finite_are_refused_and_nothing_is_left(
    bases: dict[str, Path], prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], processes: int
) -> None:
    out = tmp_path / "set"
    loud = tmp_path / "unet"
    shutil.copytree(bases["sd"] / "unet", loud)
    weights = load_file(loud / "diffusion_pytorch_model.safetensors")
    weights["conv_out.weight"] *= 1e8
    save_file(weights, loud / "diffusion_pytorch_model.safetensors")
    command = arguments(bases["sd"], prompts, out, "--unet", loud, "--processes", processes)
    output = refused(command, capsys)
    assert (
        "not finite in float16" in output and "Give another --dtype, or a smaller --guidance_scale." in output
    )
    assert tars(out) == {} and (processes == 2 or not list(out.glob(".making-*")))


def test_a_process_that_is_killed_ends_the_command_in_one_sentence(
    bases: dict[str, Path],
    prompts: Path,
    made: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = arguments(bases["sd"], prompts, tmp_path / "set", "--processes", 2)
    with monkeypatch.context() as patched:
        patched.setattr(CommandProgress, "__call__", lambda self, count: _kill_a_child())
        output = refused(command, capsys, code=1)
    assert (
        "a process was killed by signal 9; the same command resumes from the shards that are complete."
        in output
    )
    assert not multiprocessing.active_children()
    main([*command, "--processes", "1"])
    assert tars(tmp_path / "set") == tars(made)


def _kill_a_child() -> None:
    for child in multiprocessing.active_children()[:1]:
        child.kill()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--guidance_scale", "0.5"], "--guidance_scale is 0.5, but must be a number of at least 1"),
        (["--steps", "0"], "--steps is '0', but must be an integer from 1 to 1000."),
        (["--part", "4/4"], "--part is '4/4', but must be I/N with I below N; 0/4 is the first of four"),
        (["--seed", "-1"], "--seed is '-1', but must be an integer from 0 to 2147483647."),
        (
            ["--count", "99999999999"],
            "--count is '99999999999', but must be an integer of at least 1, at most",
        ),
        (["--guidance_scale", "101"], "--guidance_scale is '101.0', but must be a number from 0 to 100."),
        (["--steps", "1001"], "--steps is '1001', but must be an integer from 1 to 1000."),
    ],
)
def test_wrong_numbers_are_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, wrong: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as end:
        main([*arguments(tmp_path, "toy:train", tmp_path), *wrong])
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_prompts_come_from_text_shards_and_the_toy_world(prompts: Path, made: Path) -> None:
    text = open_prompts(str(prompts))
    assert text.size == 5 and text.at([0, 4, 5, 11]) == [LINES[i] for i in (0, 4, 0, 1)]
    (made.parent / "one.txt").write_text("a\u2028b\u0085c\x0cd\r\ne\r\n")  # str.splitlines would find five
    one = open_prompts(str(made.parent / "one.txt"))
    assert one.size == 2 and one.at([0, 1]) == ["a\u2028b\x85c\x0cd", "e"]
    shards = open_prompts(str(made))
    assert shards.size == 11 and shards.at([1, 10, 12]) == [LINES[i] for i in (1, 0, 1)]
    assert open_prompts(f"{made}/{{00000..00001}}.tar").size == 8
    toy = open_prompts("toy:val")
    assert toy.size is None and toy.at([3, 4]) == captions("val", 2, 3)
    assert (
        len({text.fingerprint, shards.fingerprint, toy.fingerprint, open_prompts("toy:train").fingerprint})
        == 4
    )
