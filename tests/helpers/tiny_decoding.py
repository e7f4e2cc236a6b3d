"""A decoder distillation at tiny size: real networks of every role, also the one that features come from."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny
from transformers import Dinov2Config, Dinov2Model

from sdxs_lightning.networks.image_features import Dinov2Features
from sdxs_lightning.networks.projected_discriminator import ProjectedDiscriminator
from sdxs_lightning.networks.tiny_decoder import DecoderTopology, TinyDecoder
from sdxs_lightning.objectives.decoder_distillation import ProjectedAdversarial, Reconstruction
from sdxs_lightning.objectives.pixel_adversarial import PixelAdversarial
from sdxs_lightning.stages.decoder import DecoderDistillation
from sdxs_lightning.stages.decoder_pairs import SampledLatents
from tests.helpers.tiny_distillation import family_of

TOPOLOGY = DecoderTopology(block_out_channels=(8, 8), num_decoder_blocks=(1, 1))
SGD = partial(torch.optim.SGD, lr=0.1)


def save_dinov2(folder: Path) -> Path:
    """A DINOv2 of two layers, 16 wide, for images of 32 px in patches of 8; written once."""
    if not folder.exists():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = Dinov2Config(
                hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
            )
            Dinov2Model(config).save_pretrained(folder)
    return folder


def save_tiny_autoencoder(folder: Path, **changes: Any) -> Path:
    """An AutoencoderTiny of TOPOLOGY with a random encoder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        AutoencoderTiny(**TOPOLOGY.config(4) | changes).save_pretrained(folder)
    return folder


def decoding(base: Path, features: Path | None = None, **settings: Any) -> DecoderDistillation:
    """A stage with the defaults of the tests: SGD, latents of the data; the GAN from the start where features are given."""
    optimizer = settings.pop("optimizer", SGD)
    settings.setdefault("decoder", TinyDecoder(optimizer, topology=TOPOLOGY))
    if features is not None:
        settings.setdefault("features", Dinov2Features(str(features), layers=[0, 1], size_px=32))
        settings.setdefault("discriminator", ProjectedDiscriminator(optimizer))
        settings.setdefault("adversarial", ProjectedAdversarial(l1_only_share=0.0, r1_weight=0.1, crop_px=24))
    defaults: dict[str, Any] = {
        "max_student_updates": 100,
        "sampler": None,
        "reconstruction": Reconstruction(weight=2.0, full_resolution_weight=0.5),
        "ema_decay": 0.9,
        "gradient_clip_norm": None,
        "seed": 3,
    }
    return DecoderDistillation(family=family_of(base), **defaults | settings)


def pixel_gan(dinov2: Path, optimizer: Any = SGD, **settings: Any) -> dict[str, Any]:
    """The parts of a GAN on images, for `distillation`.

    Args:
        dinov2: folder of `save_dinov2`.
        optimizer: of the heads.
        settings: of `PixelAdversarial`.
    """
    return {
        "discriminator": ProjectedDiscriminator(optimizer),
        "adversarial": None,
        "pixel_adversarial": PixelAdversarial(**{"student_weight": 0.3, "r1_weight": 0.1} | settings),
        "image_features": Dinov2Features(str(dinov2), layers=[0, 1], size_px=32),
    }


SAMPLER = SampledLatents(steps=2, guidance_scale=3.0)
