"""The files that reading is timed on: synthetic tars as img2dataset and `data.prepare latents` write them."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
from PIL import Image

from data.shards.writer import Member, ShardWriter, encode_latents

_DISTINCT = 48  # pictures and latents that are made; they come again under other keys
JPEG_SIDE_PX = 768


def jpeg_tars(folder: Path, samples: int) -> Path:
    """Photograph-like JPEGs of 768 px with caption and json, 250 a shard."""
    rng = np.random.default_rng(0)
    contents = [_photograph(rng) for _ in range(min(_DISTINCT, samples))]
    with ShardWriter(folder, samples_per_shard=250) as writer:
        for number in range(samples):
            content = contents[number % len(contents)]
            writer.write(
                {"jpg": content, "txt": f"a caption of some words, {number}", "json": _sizes(number)}
            )
    return folder


def latent_tars(folder: Path, samples: int) -> Path:
    """Latents of SDXL at 1024 px, float16 (131 kB), with caption and json, 250 a shard."""
    rng = np.random.default_rng(0)
    contents = [
        encode_latents(rng.standard_normal((4, 128, 128), dtype=np.float32))
        for _ in range(min(_DISTINCT, samples))
    ]
    with ShardWriter(folder, samples_per_shard=250) as writer:
        for number in range(samples):
            members: dict[str, Member] = {"latent.safetensors": contents[number % len(contents)]}
            writer.write(members | {"txt": f"a caption of some words, {number}", "json": _sizes(number)})
    return folder


def many_shards(folder: Path, shards: int, samples: int) -> Path:
    """`shards` names of one shard of tiny samples: an index of any size on little disk."""
    tiny = encode_latents(np.zeros((4, 1, 1), dtype=np.float32))
    with ShardWriter(folder, prefix="first-", samples_per_shard=samples) as writer:
        for number in range(samples):
            writer.write({"latent.safetensors": tiny, "txt": f"caption {number}"})
    for number in range(1, shards):
        os.link(writer.paths[0], folder / f"other-{number:05d}.tar")
    return folder


def _sizes(number: int) -> dict[str, int]:
    return {
        "original_height": JPEG_SIDE_PX + number % 7,
        "original_width": JPEG_SIDE_PX,
        "crop_top": 0,
        "crop_left": 0,
    }


def _photograph(rng: np.random.Generator) -> bytes:
    """Smooth shapes with some grain: compresses about as photographs do."""
    small = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8))
    smooth = np.asarray(small.resize((JPEG_SIDE_PX, JPEG_SIDE_PX), Image.Resampling.BICUBIC)).astype(np.int16)
    grain = rng.integers(-2, 3, smooth.shape, dtype=np.int16)
    stream = io.BytesIO()
    Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=85)
    return stream.getvalue()
