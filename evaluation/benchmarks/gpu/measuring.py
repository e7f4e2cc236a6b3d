"""Section `evaluation`: FID statistics and CLIP scores per second, and resizing to the same bits as on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from evaluation.benchmarks.gpu.section import SectionRun, seconds_of
from evaluation.metrics.statistics import Sums
from evaluation.networks.clip_loading import OPENAI_MEAN, OPENAI_STD, LoadedClip
from evaluation.networks.frozen_clip import FrozenClip
from evaluation.networks.inception import InceptionFeatures
from evaluation.networks.inception_network import Inception
from evaluation.networks.resize import Filter, resize_uint8

EOS = 49407
TINY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def run(run: SectionRun) -> None:
    """From images of 512 px in 8 bits to float64 sums of features, to CLIP scores, and to 256 px; weights are random."""
    size, px = (2, 64) if run.tiny else (64, 512)
    images = torch.randint(0, 256, (size, 3, px, px), dtype=torch.uint8)
    there = images.to(run.device)
    repeats = 1 if run.tiny else 10

    def rate(work: Any) -> dict[str, float]:
        return {"images_per_second": size / seconds_of(work, run.device, repeats, warmups=min(repeats, 2))}

    def statistics() -> dict[str, float]:
        features = RandomInception()
        sums = Sums.of(torch.empty(0, features.dimensions), features.dimensions, run.device)
        return rate(lambda: sums.add(features(there)))

    def clip_score() -> dict[str, float]:
        clip = FrozenClip(random_clip(run.tiny)).to(run.device)
        return rate(lambda: clip.cosine(there, ["a photo"] * size))

    run.attempt(statistics, what="FID statistics (Inception, float32)", batch_size=size)
    run.attempt(clip_score, what="CLIP score (ViT-L/14, float32)", batch_size=size)
    kinds: tuple[Filter, ...] = ("lanczos", "bicubic")
    for kind in kinds:

        def resize(kind: Filter = kind) -> dict[str, float | bool]:
            on_device = resize_uint8(there, (256, 256), kind).cpu()
            equal = torch.equal(on_device, resize_uint8(images, (256, 256), kind))
            return rate(lambda: resize_uint8(there, (256, 256), kind)) | {"bits_equal_cpu": equal}

        run.attempt(resize, what=f"resize to 256 px, {kind}", batch_size=size)


class RandomInception(InceptionFeatures):
    """Of FID's architecture, without a file of weights."""

    def __init__(self) -> None:
        self.resize, self.name = "clean", "inception-random"
        self.network = Inception().eval().requires_grad_(False)
        self.device = torch.device("cpu")


def random_clip(tiny: bool) -> LoadedClip:
    """ViT-L/14's architecture."""
    from transformers import CLIPConfig, CLIPModel

    text: dict[str, Any] = {"eos_token_id": EOS, "bos_token_id": EOS - 1}
    text |= TINY if tiny else {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    vision: dict[str, Any] = {"patch_size": 14, "image_size": 224}
    vision |= (
        TINY
        if tiny
        else {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
        }
    )
    network = CLIPModel(
        CLIPConfig(text_config=text, vision_config=vision, projection_dim=16 if tiny else 768)
    )

    def tokenize(captions: Sequence[str]) -> Tensor:
        ids = torch.randint(0, EOS - 1, (len(captions), 77))
        ids[:, -1] = EOS
        return ids

    def pooled(output: Any) -> Tensor:
        found: Tensor = output if isinstance(output, Tensor) else output.pooler_output
        return found

    return LoadedClip(
        name="random",
        model=network,
        encode_image=lambda pixels: pooled(network.get_image_features(pixel_values=pixels)),
        encode_text=lambda ids: pooled(network.get_text_features(input_ids=ids)),
        tokenizer=tokenize,
        eos_token_id=EOS,
        size=224,
        mean=OPENAI_MEAN,
        std=OPENAI_STD,
        image_settings="",
        text_settings="",
    )
