"""Whether a toy base follows its size conditioning: sharpness and accuracy at several original sizes and crops."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from data.toy.original_sizes import MARGIN_PX
from data.toy.training.classifier import AttributeClassifier
from evaluation.benchmarks.tables.score_files import write_scores
from evaluation.images.generate import RealImages
from evaluation.protocols.protocols import Protocol, get_protocol
from evaluation.runner.machine import where
from evaluation.runner.teacher_scores import GUIDANCE_SCALE
from evaluation.user_errors import as_user_errors
from sdxs_lightning.core.latents import to_uint8
from sdxs_lightning.core.model_hash import hash_weights
from sdxs_lightning.core.seeding import Stream, normal
from sdxs_lightning.families import Family
from sdxs_lightning.families.detect import detect_family
from sdxs_lightning.inference.generator import torch_device
from sdxs_lightning.networks.denoiser import Denoiser
from sdxs_lightning.pairs.target_sampler import TargetSampler

if TYPE_CHECKING:
    from evaluation.benchmarks.tables.options import SizeConditioningOptions


@as_user_errors()
def size_conditioning(options: SizeConditioningOptions) -> str:
    """Measure the same prompts and noise under three size conditions, and real images."""
    protocol, device = get_protocol("toy", samples=options.samples), torch_device(options.device)
    family = detect_family(options.base).to(device)
    if family.encode_prompts([""]).add_time_ids is None:
        raise ValueError(
            f"'{options.base}' is not conditioned on sizes (its prompts have no add_time_ids); give a base that is."
        )
    unet = family.load_unet().eval().requires_grad_(False)
    denoiser = Denoiser(unet, family.schedule, family.prediction_type).to(device)
    sampler = TargetSampler(denoiser, options.steps, GUIDANCE_SCALE)
    side = family.resolution
    conditions = {"plain": (side, 0), "half_size": (side // 2, 0), "cropped": (side, MARGIN_PX)}
    images = {
        name: sampled_images(family, sampler, protocol, size_px, crop_px, options.batch_size, device, name)
        for name, (size_px, crop_px) in conditions.items()
    }
    prompts, rows = protocol.captions(), {}
    images["real"] = RealImages(protocol.split)([], torch.arange(len(prompts)))
    classifier = AttributeClassifier.from_pretrained(protocol.path(protocol.classifier))
    for name, images_uint8 in images.items():
        right = classifier.right(images_uint8.cpu(), prompts).all(dim=1).float().mean()
        rows[name] = {"sharpness": sharpness(images_uint8), "caption_accuracy": float(right)}
    result = {
        "base_sha256": hash_weights(options.base),
        "steps": options.steps,
        "guidance_scale": GUIDANCE_SCALE,
        "rows": rows,
        "protocol": protocol.describe(),
        **where(device),
    }
    return write_scores(options.out, result)


@torch.no_grad()
def sampled_images(
    family: Family,
    sampler: TargetSampler,
    protocol: Protocol,
    size_px: int,
    crop_px: int,
    batch_size: int = 100,
    device: torch.device | None = None,
    description: str = "",
) -> Tensor:
    """Images (B, 3, H, W) uint8 from the protocol's prompts and noise, conditioned on an original size and a crop."""
    images, prompts = [], protocol.captions()
    for start in track(range(0, len(prompts), batch_size), description, console=Console(stderr=True)):
        texts = prompts[start : start + batch_size]
        numbers = torch.arange(start, start + len(texts), device=device)
        noise = normal(protocol.seed, Stream.EVALUATION, numbers, family.latent_shape())
        sizes, crops = (torch.full((len(texts), 2), value) for value in (size_px, crop_px))
        latents = sampler(noise, family.encode_prompts(texts, sizes, crops))
        images.append(to_uint8(family.decode(latents)))
    return torch.cat(images)


def sharpness(images_uint8: Tensor) -> float:
    """Mean absolute difference of neighbouring pixels in both directions; down- and upsampling an image lowers it.

    Args:
        images_uint8: (B, 3, H, W).
    """
    images = images_uint8.float()
    return float((images.diff(dim=-1).abs().mean() + images.diff(dim=-2).abs().mean()) / 2)
