"""The scale of latents: one method of the family, for encoding, decoding, training batches and prepared data."""

from __future__ import annotations

import ast
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from diffusers import AutoencoderKL
from PIL import Image

from data.prepare.__main__ import main
from data.prepare.common.raw_shards import RawShards
from data.shards.index import ShardSet
from data.shards.store import ShardStore
from data.shards.writer import ShardWriter
from sdxs_lightning.export import export_pipeline
from sdxs_lightning.families.sd import StableDiffusion
from sdxs_lightning.memory_plan.weightless import WeightlessFamily
from sdxs_lightning.pairs.target_pairs import PairSettings, TargetPairs
from sdxs_lightning.stages.data_sample import data_sample
from sdxs_lightning.stages.decoder_pairs import DecoderPairs
from tests.helpers.tiny import LATENT_SHAPE, RESOLUTION_PX, save_tiny_sd, tiny_batch, tiny_sd_unet

SCALE, SHIFT = 0.5, 0.125


def set_vae(base: Path, **settings: Any) -> Path:
    config = base / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    return base


@pytest.fixture(scope="module")
def shifted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return set_vae(save_tiny_sd(tmp_path_factory.mktemp("shifted") / "base"), shift_factor=SHIFT)


@torch.no_grad()
def test_encode_scale_unscale_and_decode_are_the_arithmetic_of_diffusers(shifted: Path) -> None:
    """As in StableDiffusion3Img2ImgPipeline.prepare_latents and StableDiffusion3Pipeline.__call__."""
    family = StableDiffusion(str(shifted))
    vae = family.load_vae()
    assert (vae.config.scaling_factor, vae.config.shift_factor) == (SCALE, SHIFT)
    images = (
        torch.rand(2, 3, RESOLUTION_PX, RESOLUTION_PX, generator=torch.Generator().manual_seed(0)) * 2 - 1
    )
    mean = vae.encode(images).latent_dist.mode()
    scaled = (mean - vae.config.shift_factor) * vae.config.scaling_factor
    assert torch.equal(family.scale_latents(mean), scaled)
    torch.testing.assert_close(family.encode(images), scaled, rtol=1e-6, atol=1e-6)
    unscaled = scaled / vae.config.scaling_factor + vae.config.shift_factor
    assert torch.equal(family.unscale_latents(scaled), unscaled)
    torch.testing.assert_close(unscaled, mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(family.decode(scaled), vae.decode(unscaled).sample, rtol=1e-5, atol=1e-5)
    planned = WeightlessFamily(family).scale_latents(mean.to("meta"))
    assert planned.shape == mean.shape and planned.device.type == "meta"


@torch.no_grad()
def test_an_export_decodes_as_the_family_although_the_pipeline_reads_no_shift(
    shifted: Path, tmp_path: Path
) -> None:
    family = StableDiffusion(str(shifted))
    folder = export_pipeline(tiny_sd_unet(), family, tmp_path / "out", dtype=torch.float32)
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    assert vae.config.scaling_factor == SCALE and not vae.config.shift_factor
    images = (
        torch.rand(2, 3, RESOLUTION_PX, RESOLUTION_PX, generator=torch.Generator().manual_seed(0)) * 2 - 1
    )
    latents = family.encode(images)
    # As StableDiffusionPipeline does.
    torch.testing.assert_close(
        vae.decode(latents / SCALE).sample, family.decode(latents), rtol=1e-4, atol=1e-5
    )
    encoded = vae.encode(images).latent_dist
    torch.testing.assert_close(encoded.mode() * SCALE, latents, rtol=1e-4, atol=1e-5)
    before = family.load_vae().encode(images).latent_dist
    torch.testing.assert_close(encoded.logvar, before.logvar, rtol=1e-4, atol=1e-5)


def test_training_batches_are_scaled_and_shifted(shifted: Path) -> None:
    family, batch = StableDiffusion(str(shifted)), tiny_batch(2)
    assert batch.latents is not None
    expected = (batch.latents - SHIFT) * SCALE
    assert torch.equal(data_sample(batch, family, seed=0).latents, expected)
    decoder_pairs = DecoderPairs(None, "vae", seed=0)
    decoder_pairs.load(family, torch.float32)
    assert torch.equal(decoder_pairs.latents(batch), expected)
    pairs = TargetPairs(PairSettings(source="batch"), seed=0)
    pairs.build(family)
    assert torch.equal(pairs.pick(replace(batch, pair_noise_seeds=torch.arange(2))).target, expected)


def test_ordinary_vaes_are_scaled_as_before(tmp_path: Path) -> None:
    family = StableDiffusion(str(set_vae(save_tiny_sd(tmp_path / "base"), latents_mean=None)))
    latents = torch.randn(2, *LATENT_SHAPE)
    assert family.shift_factor == 0.0
    assert torch.equal(family.scale_latents(latents), latents * SCALE)
    assert torch.equal(family.unscale_latents(latents), latents / SCALE)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of numpy's, inside diffusers
def test_prepared_latents_are_stored_unscaled_and_summarised_scaled(
    shifted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, RESOLUTION_PX, RESOLUTION_PX, 3), dtype=np.uint8)
    with ShardWriter(tmp_path / "images", samples_per_shard=2) as writer:
        for image in pixels:
            writer.write({"png": _png(image), "txt": "a red circle"})
    out = tmp_path / "latents"
    command = [
        "latents",
        "--model",
        shifted,
        "--from",
        tmp_path / "images",
        "--out",
        out,
        "--dtype",
        "float32",
    ]
    main([str(one) for one in (*command, "--processes", 1, "--device", "cpu")])
    stored = torch.stack(
        [torch.from_numpy(safetensors.numpy.load(member)["latents"]) for member in _latent_members(out)]
    )
    family = StableDiffusion(str(shifted))
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
    torch.testing.assert_close(family.scale_latents(stored), family.encode(images), rtol=1e-4, atol=1e-5)
    summary = json.loads((out / "summary.json").read_text())
    scaled = family.scale_latents(stored)
    assert summary["latents_mean"] == pytest.approx(scaled.mean().item(), abs=1e-5)
    assert summary["latents_std"] == pytest.approx(scaled.std(correction=0).item(), rel=1e-4)
    plain = save_tiny_sd(tmp_path / "plain") / "vae"
    with pytest.raises(SystemExit):
        main([str(one) for one in (*command[:-4], "--out", tmp_path / "no", "--vae", plain)])
    assert f"shift_factor 0.0), and the U-Net of '{shifted}' reads 4" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["latents_mean", "latents_std"])
def test_latents_normalised_by_channel_are_refused(tmp_path: Path, key: str) -> None:
    base = set_vae(save_tiny_sd(tmp_path / "base"), **{key: [0.5] * 4})
    with pytest.raises(
        ValueError, match=f"config.json' sets {key}, and latents are scaled by .* set these keys to null"
    ):
        StableDiffusion(str(base))


def test_nobody_else_scales_latents() -> None:
    """Outside the families only decoders of other autoencoders (`PixelDecoder`) know a scaling factor."""
    root = Path(__file__).parents[2]
    files = [
        path for name in ("sdxs_lightning", "data", "evaluation") for path in (root / name).rglob("*.py")
    ]
    importers = {
        path.relative_to(root).as_posix()
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom)
        and node.module == "sdxs_lightning.core.latents"
        and {"scale", "unscale"} & {alias.name for alias in node.names}
    }
    assert importers == {
        "sdxs_lightning/families/pretrained.py",
        "sdxs_lightning/networks/decoded_image_features.py",
    }


def _png(image: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


def _latent_members(folder: Path) -> list[bytes]:
    shards = RawShards(ShardSet.open(str(folder)), ShardStore())
    members = [shards.sample(i).members["latent.safetensors"] for i in range(len(shards))]
    shards.close()
    return members
