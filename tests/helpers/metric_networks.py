"""Tiny random metric networks in the layouts of the real ones, so that the metrics are tested without trained weights."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file
from transformers import CLIPTokenizer

from data.toy.world import BACKGROUNDS, COLOURS, RELATIONS, SHAPES, SIZES
from evaluation.protocols.protocols import PROTOCOLS, Protocol, get_protocol

WORDS = ("a", "an", "on", "background", *COLOURS, *SHAPES, *SIZES, *BACKGROUNDS, *" ".join(RELATIONS).split())
CONTEXT_LENGTH = 12


def write_tokenizer(folder: Path) -> None:
    """A CLIPTokenizer that knows letters and the words of the toy world."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters)]
    merges: list[tuple[str, str]] = []
    for word in sorted(set(WORDS)):
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            pair = (pieces[0], pieces[1])
            if pair not in merges:
                merges.append(pair)
                vocabulary.append("".join(pair))
            pieces[:2] = ["".join(pair)]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    numbered = {token: number for number, token in enumerate(dict.fromkeys(vocabulary))}
    CLIPTokenizer(vocab=numbered, merges=merges).save_pretrained(folder)


def write_clip(folder: Path, seed: int = 0) -> Path:
    """A random open_clip model of 40 k parameters for 32x32 images, in open_clip's local layout."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder)
    model_cfg = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16},
        "text_cfg": {
            "context_length": CONTEXT_LENGTH,
            "vocab_size": 256,
            "width": 32,
            "heads": 2,
            "layers": 1,
            "hf_tokenizer_name": "local",
        },
    }
    preprocess_cfg = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg})
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def small_protocols(world: Path) -> dict[str, Protocol]:
    """The named protocols with 7 samples, references of 40 images, and the networks in a folder."""
    paths = {"clip": str(world / "clip"), "classifier": str(world / "classifier")}
    return {
        name: get_protocol(
            name, samples=7, reference_samples=40, reference=str(world / f"{name}.npz"), **paths
        )
        for name in PROTOCOLS
    }


def random_images(count: int, seed: int = 0, size: int = 32) -> torch.Tensor:
    """(count, 3, size, size) uint8: smooth random blobs, so that features differ between images."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    images = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")
    return (images * 255).round().to(torch.uint8)
