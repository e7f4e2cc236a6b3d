"""`python -m data.prepare latents`: the VAE's latents, byte for byte the same however often a run was killed."""

from __future__ import annotations

import io
import json
import multiprocessing
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from data.prepare.__main__ import main
from data.prepare.common.raw_shards import RawShards
from data.prepare.latents import job as latent_job
from data.shards.datamodule import ShardDataModule
from data.shards.index import ShardSet
from data.shards.store import ShardStore
from data.shards.writer import ShardWriter
from sdxs_lightning.families.detect import detect_family
from tests.helpers.preparing import files, killed_in_its_second_shard, refused
from tests.helpers.ranks.processes import PRELOAD
from tests.helpers.tiny import save_tiny_sd, save_tiny_sdxl, tiny_vae

# Of numpy's, inside diffusers.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

SIZES = [(40, 32), (32, 32), (32, 64), (64, 64), (33, 48), (64, 30), (50, 50), (32, 41), (70, 32), (36, 36)]
"""Width, height."""


def noise_image(size: tuple[int, int], seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {"sd": save_tiny_sd(folder / "sd"), "sdxl": save_tiny_sdxl(folder / "sdxl")}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten images in shards of 4, 4 and 2."""
    folder = tmp_path_factory.mktemp("images")
    with ShardWriter(folder, samples_per_shard=4) as writer:
        for i, size in enumerate(SIZES):
            sample: dict[str, Any] = {"png": png(noise_image(size, i)), "txt": f"image {i}"}
            if i == 2:
                sample["json"] = {
                    "original_height": 640,
                    "original_width": 320,
                    "crop_top": 6,
                    "crop_left": 2,
                }
            if i == 3:
                sample["cond.png"] = png(noise_image(size, 100))
            writer.write(sample, key=f"here-{i}")
    return folder


def command(base: Path, images: Path | str, out: Path, *more: object) -> list[str]:
    fixed = ["--batch_size", 3, "--processes", 1, "--device", "cpu"]
    named = ["--model", base, "--from", images, "--out", out]
    return [str(one) for one in ("latents", *named, *fixed, *more)]


def members(folder: Path) -> dict[str, dict[str, bytes]]:
    shards = RawShards(ShardSet.open(str(folder)), ShardStore())
    samples = [shards.sample(i) for i in range(len(shards))]
    shards.close()
    return {sample.key: sample.members for sample in samples}


def latents(sample: dict[str, bytes]) -> dict[str, Any]:
    return dict(safetensors.numpy.load(sample["latent.safetensors"]))


@torch.no_grad()
def reference(vae: AutoencoderKL, image: Image.Image) -> tuple[Any, Any]:
    """Mean and logvar as diffusers' own image processor and VAE give them."""
    pixels = VaeImageProcessor(vae_scale_factor=2).preprocess(image)
    found = vae.encode(pixels).latent_dist
    return found.mean[0].numpy(), found.logvar[0].numpy()


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_latents_are_what_diffusers_gives(
    bases: dict[str, Path], images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    out = tmp_path / "set"
    main(command(bases[kind], images, out, "--dtype", "float32", "--store", "mean+logvar"))
    output = capsys.readouterr().out
    assert (
        "10 samples read in " in output and "holds 10 samples in 3 shards; scaled latents of mean " in output
    )
    found = members(out)
    vae = tiny_vae()
    for i, size in enumerate(SIZES):
        # The base's own 32 pixels: the shorter side becomes 32, then the middle is cut out.
        scale = 32 / min(size)
        image = noise_image(size, i).resize(
            (round(size[0] * scale), round(size[1] * scale)), Image.Resampling.BICUBIC
        )
        left, top = (image.width - 32) // 2, (image.height - 32) // 2
        mean, logvar = reference(vae, image.crop((left, top, left + 32, top + 32)))
        stored = latents(found[f"here-{i}"])
        assert stored["latents"].shape == (4, 16, 16) and stored["latents"].dtype == np.float32
        np.testing.assert_allclose(stored["latents"], mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(stored["logvar"], logvar, rtol=1e-4, atol=1e-5)
    summary = json.loads((out / "summary.json").read_text())
    every = np.stack([latents(sample)["latents"] for sample in found.values()]) * 0.5
    assert summary["latents_mean"] == pytest.approx(float(every.mean()), abs=1e-5)
    assert summary["latents_std"] == pytest.approx(float(every.std()), rel=1e-4)


def test_a_training_reads_them_with_captions_and_sizes(
    bases: dict[str, Path], images: Path, tmp_path: Path
) -> None:
    main(command(bases["sdxl"], images, tmp_path / "half"))
    main(command(bases["sdxl"], images, tmp_path / "single", "--dtype", "float32"))
    batches = []
    for name in ("half", "single"):
        data = ShardDataModule(
            str(tmp_path / name), 5, contents=["latents", "sizes"], shuffle_window_shards=0
        )
        data.setup()
        assert data.dataset is not None
        batches.append(data.dataset.batch(range(10)))
    half, single = batches
    assert half.captions == [f"image {i}" for i in range(10)] and half.latents is not None
    assert single.latents is not None and half.latents.equal(single.latents.half().float())
    assert half.original_sizes is not None and half.crops is not None
    sizes = [[height, width] for width, height in SIZES]
    sizes[2] = [640, 320]  # as its json says
    assert half.original_sizes.tolist() == sizes
    # 32x64 is cut from row 16 on; what was cut off before, at the same scale, comes on top.
    assert half.crops[2].tolist() == [6 + 16, 2] and half.crops[0].tolist() == [0, 4]
    assert half.crops[4].tolist() == [(round(48 * 32 / 33) - 32) // 2, 0]
    conditions = detect_family(str(bases["sdxl"])).encode_prompts(
        half.captions, half.original_sizes, half.crops
    )
    assert conditions.add_time_ids is not None
    assert conditions.add_time_ids[2].tolist() == [640, 320, 22, 2, 32, 32]


def test_a_condition_image_is_resized_as_its_image(
    bases: dict[str, Path], images: Path, tmp_path: Path
) -> None:
    main(command(bases["sd"], images, tmp_path / "set"))
    found = members(tmp_path / "set")
    control = Image.open(io.BytesIO(found["here-3"]["cond.png"]))
    expected = noise_image((64, 64), 100).resize((32, 32), Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(control), np.asarray(expected))
    assert list(found["here-2"]) == ["json", "latent.safetensors", "txt"]


def test_sizes_of_several_aspects(bases: dict[str, Path], images: Path, tmp_path: Path) -> None:
    main(command(bases["sd"], images, tmp_path / "buckets", "--buckets"))
    main(command(bases["sd"], images, tmp_path / "sizes", "--sizes", "32x32", "22x46", "46x22"))
    shapes = {
        key: latents(sample)["latents"].shape[1:] for key, sample in members(tmp_path / "sizes").items()
    }
    assert shapes == {
        f"here-{i}": {2: (23, 11), 4: (23, 11), 5: (11, 23), 8: (11, 23)}.get(i, (16, 16)) for i in range(10)
    }
    rows = json.loads(members(tmp_path / "sizes")["here-2"]["json"])
    assert (rows["height"], rows["width"]) == (46, 22)
    # Steps of 2 pixels, so that hardly anything is cut off.
    for key, sample in members(tmp_path / "buckets").items():
        content = json.loads(sample["json"])
        width, height = SIZES[int(key.removeprefix("here-"))]
        assert content["height"] * content["width"] <= 32 * 32
        assert content["height"] / content["width"] == pytest.approx(height / width, rel=0.1)
        shape = latents(sample)["latents"].shape
        assert shape == (4, content["height"] // 2, content["width"] // 2)


def test_a_killed_run_resumes_to_the_same_shards_in_several_processes(
    bases: dict[str, Path], images: Path, tmp_path: Path
) -> None:
    options = ("--buckets", "--store", "mean+logvar")
    main(command(bases["sd"], images, tmp_path / "complete", *options))
    main(command(bases["sd"], images, tmp_path / "again", *options, "--processes", 2))
    assert (
        files(tmp_path / "again") == files(tmp_path / "complete") and len(files(tmp_path / "complete")) == 10
    )
    out = tmp_path / "set"
    arguments = command(bases["sd"], images, out, *options)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOAD, "data.prepare.__main__"])
    run = context.Process(target=killed_in_its_second_shard, args=(arguments, out))
    run.start()
    run.join(120)
    assert run.exitcode == -signal.SIGKILL
    assert [path.name for path in out.glob("*.tar")] == ["00000.tar"] and list(
        out.glob(".making-*/*.partial")
    )
    before = (out / "00000.tar").stat().st_mtime_ns
    main([*arguments, "--part", "1/2"])
    main([*arguments, "--processes", "2"])
    assert files(out) == files(tmp_path / "complete")
    assert (out / "00000.tar").stat().st_mtime_ns == before and not list(out.glob(".making-*"))


def test_broken_samples_are_left_out_up_to_a_fraction(
    bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    complete = png(noise_image((32, 32), 0))
    with ShardWriter(tmp_path / "images") as writer:
        for i in range(6):
            writer.write({"png": complete[:100] if i in (1, 4) else complete, "txt": "words"}, key=str(i))
    message = refused(command(bases["sd"], tmp_path / "images", tmp_path / "set"), capsys)
    shard = f"{tmp_path}/images/00000.tar"
    assert (
        f"{shard}: more than 1 of 6 samples are broken, the last: {shard}, key '4': the image cannot be dec"
        in message
    )
    assert not list((tmp_path / "set").glob("*.tar"))
    main(command(bases["sd"], tmp_path / "images", tmp_path / "set", "--bad_samples", 0.3))
    assert "holds 4 samples in 1 shards; left out: 2 unreadable; scaled latents" in capsys.readouterr().out
    assert list(members(tmp_path / "set")) == ["0", "2", "3", "5"]


def test_another_vae_than_the_bases(
    bases: dict[str, Path], images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_vae(seed=1).save_pretrained(tmp_path / "other")
    main(command(bases["sd"], images, tmp_path / "set", "--vae", tmp_path / "other", "--dtype", "float32"))
    mean, _ = reference(tiny_vae(seed=1), noise_image((32, 32), 1))
    stored = latents(members(tmp_path / "set")["here-1"])
    assert list(stored) == ["latents"]
    np.testing.assert_allclose(stored["latents"], mean, rtol=1e-4, atol=1e-5)
    assert "was started with vae_fingerprint" in refused(
        command(bases["sd"], images, tmp_path / "set", "--dtype", "float32"), capsys
    )
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.25}))
    message = refused(command(bases["sd"], images, tmp_path / "no", "--vae", tmp_path / "other"), capsys)
    assert "gives 4 channels (scaling_factor 0.25, shift_factor 0.0)" in message
    assert "(scaling_factor 0.5, shift_factor 0.0); they do not belong together" in message


def test_float16_is_refused_for_a_vae_that_overflows_there(
    bases: dict[str, Path], images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(command(bases["sdxl"], images, tmp_path / "set", "--vae_dtype", "float16"), capsys)
    assert (
        "overflows in float16 (force_upcast in its config); give float32 or bfloat16, or with --vae"
        in message
    )
    shutil.copytree(bases["sdxl"] / "vae", tmp_path / "fixed")
    config = json.loads((tmp_path / "fixed" / "config.json").read_text())
    (tmp_path / "fixed" / "config.json").write_text(json.dumps(config | {"force_upcast": False}))
    half = ("--vae", tmp_path / "fixed", "--vae_dtype", "bfloat16")
    main(command(bases["sdxl"], images, tmp_path / "set", *half))
    stored = latents(members(tmp_path / "set")["here-1"])["latents"]
    mean, _ = reference(tiny_vae(), noise_image((32, 32), 1))
    assert 0 < np.abs(stored - mean).max() / mean.std() < 0.1


def test_latents_that_are_not_finite_are_refused(
    bases: dict[str, Path], images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vae = tiny_vae()
    with torch.no_grad():
        vae.quant_conv.bias.fill_(1e6)
    vae.save_pretrained(tmp_path / "large")
    message = refused(command(bases["sd"], images, tmp_path / "set", "--vae", tmp_path / "large"), capsys)
    assert "key 'here-0': the VAE gives latents that are not finite in float16; give --vae_dtype" in message
    main(command(bases["sd"], images, tmp_path / "set32", "--vae", tmp_path / "large", "--dtype", "float32"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--dtype", "float32"], "was started with dtype 'float16' and this command says 'float32'"),
        (["--batch_size", 2], "was started with batch_size 3 and this command says 2"),
        (["--resolution", 16], "was started with sizes [[32, 32]] and this command says [[16, 16]]"),
    ],
)
def test_a_set_is_not_resumed_with_other_settings(
    bases: dict[str, Path],
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changed: list[object],
    message: str,
) -> None:
    main(command(bases["sd"], images, tmp_path / "set"))
    before = files(tmp_path / "set")
    assert message in refused(command(bases["sd"], images, tmp_path / "set", *changed), capsys)
    assert files(tmp_path / "set") == before


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--model", "nowhere"], "--model: StableDiffusion: there is no folder 'nowhere'"),
        (["--from", "nowhere"], "--from 'nowhere': There is no shard or folder 'nowhere'"),
        (
            ["--vae", "nowhere"],
            "--vae: 'nowhere' is neither a VAE folder (config.json) nor a pipeline folder",
        ),
        (["--sizes", "32x33"], "a size of 32x33 pixels is not a multiple of 2, the pixels of one latent"),
    ],
)
def test_bad_inputs_are_refused(
    bases: dict[str, Path],
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changed: list[object],
    message: str,
) -> None:
    assert message in refused(command(bases["sd"], images, tmp_path / "set", *changed), capsys)
    assert not (tmp_path / "set").exists()


def test_threads_keep_the_order_and_do_not_run_far_ahead() -> None:
    begun: list[int] = []

    def items() -> Any:
        for i in range(50):
            begun.append(i)
            yield i

    with ThreadPoolExecutor(4) as pool:
        for i, found in enumerate(latent_job.map_ahead(pool, lambda item: item * item, items(), ahead=5)):
            assert found == i * i and len(begun) <= i + 6
    assert len(begun) == 50
